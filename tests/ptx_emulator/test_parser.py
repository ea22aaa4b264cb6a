"""The parser: names, scopes, literals, source lines, errors."""

import pytest
from ptx_emulator.errors import PtxSyntaxError
from ptx_emulator.ptx.module import (
    Address,
    Immediate,
    Instruction,
    Label,
    Location,
    Pair,
    Register,
    Symbol,
    Vector,
)
from ptx_emulator.ptx.parser import parse

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def body_of(text: str) -> list[Instruction | Label]:
    module = parse(f"{HEADER}.visible .entry k() {{ .reg .pred %p<4>; .reg .b32 %r<9>;\n{text}\n}}")
    return module.functions["k"].body


def one(text: str) -> Instruction:
    (instruction,) = body_of(text)
    assert isinstance(instruction, Instruction)
    return instruction


def test_name_and_operands():
    i = one("@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+-16];")
    assert (i.opcode, i.modifiers) == ("ld", ("global", "v2", "b32"))
    assert i.guard == Register("%p1", negated=True)
    assert i.operands == (Vector((Register("%r1"), Register("%r2"))), Address(Register("%rd1"), -16))


def test_modifiers_with_colons():
    i = one("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2], 64, [%r3];")
    assert i.modifiers[2:] == ("shared::cluster", "global", "mbarrier::complete_tx::bytes")
    assert i.operands[2] == Immediate(64)


def test_coordinates_of_a_tensor_address():
    i = one("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, 7}], [%r2];")
    assert i.operands[0] == Address(Register("%rd1"), 0, (Register("%r1"), Immediate(7)))


def test_pairs_sinks_and_negated_predicates():
    assert one("setp.lt.and.s32 %p1|%p2, %r1, -3, !%p3;").operands == (
        Pair(Register("%p1"), Register("%p2")),
        Register("%r1"),
        Immediate(-3),
        Register("%p3", negated=True),
    )
    assert one("mbarrier.arrive.shared.b64 _, [%r1];").operands[0] == Register("_")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0f3F800000", Immediate(0, bits=0x3F800000, bits_width=32)),
        ("0d3FF0000000000000", Immediate(0, bits=0x3FF0000000000000, bits_width=64)),
        ("0x1F", Immediate(31)),
        ("0b101", Immediate(5)),
        ("017", Immediate(15)),
        ("0", Immediate(0)),
        ("4294967295U", Immediate(2**32 - 1)),
        ("-2.5", Immediate(-2.5)),
        ("WARP_SZ", Immediate(32)),
        ("smem+8", Symbol("smem", 8)),
    ],
)
def test_literals(text: str, expected: Immediate | Symbol):
    assert one(f"mov.b32 %r1, {text};").operands[1] == expected


def test_scopes_rename_registers_and_labels():
    text = "{ .reg .pred P; L: setp.eq.u32 P, %r1, 0; @P bra L; }\n{ .reg .pred P; L: @P bra L; }"
    first_label, setp, first, second_label, second = body_of(text)
    assert isinstance(first_label, Label)
    assert isinstance(second_label, Label)
    assert first_label.name != second_label.name
    assert first.operands == (Symbol(first_label.name),)
    assert second.operands == (Symbol(second_label.name),)
    assert setp.operands[0] == Register(first.guard.name)
    assert first.guard != second.guard


def test_a_branch_to_a_later_label():
    branch, label = body_of("bra END;\nEND:")
    assert branch.operands == (Symbol(label.name),)


def test_source_lines():
    text = (
        f'{HEADER}.file 1 "kernel.cu"\n.visible .entry k() {{\n.loc 1 12 3\nbar.sync 0;\n'
        ".loc 1 0 1\nmembar.gl;\nret;\n}"
    )
    first, second, third = parse(text).functions["k"].body
    assert (first.location, first.line) == (Location("kernel.cu", 12), 7)
    assert second.location is third.location is None


def test_inline_assembly_is_at_the_line_that_has_it():
    """LLVM adds lines of the assembly to the source line at each of its labels and branches."""
    text = (
        f'{HEADER}.file 1 "kernel.cu"\n.visible .entry k() {{\n.loc 1 12 3\n// begin inline asm\n{{\n'
        ".loc 1 14 3\nWAIT:\nmembar.gl;\n.loc 1 16 3\nbra.uni WAIT;\n}\n// end inline asm\n"
        "bar.sync 0;\n.loc 1 20 3\nret;\n}"
    )
    _, *instructions = parse(text).functions["k"].body
    assert [i.location.line for i in instructions] == [12, 12, 12, 20]


INLINED = """.file 1 "kernel.cu"
.file 2 "helpers.h"
.visible .entry k() {
.loc 1 6 3
bar.sync 0;
.loc 2 4 3, function_name $L__info_string0, inlined_at 1 6 3
bar.sync 1;
.loc 2 2 31, function_name $L__info_string1, inlined_at 2 4 3
bar.sync 2;
.loc 2 4 3, function_name $L__info_string0, inlined_at 1 9 7
.loc 2 2 31, function_name $L__info_string1, inlined_at 2 4 3
ret;
}
.section .debug_str
{
$L__info_string0:
.b8 95,90,54,104,101,108,112,101,114,80,102,105,0
$L__info_string1:
.b8 95,90,78,50,110,115,53,105,110,110,101,114,69,118,0

}
"""


def test_inlined_source_lines_know_where_they_were_inlined():
    call, helper, inner, again = (i.location for i in parse(HEADER + INLINED).functions["k"].body)
    assert call == Location("kernel.cu", 6)
    assert helper == Location("helpers.h", 4, "helper", call)
    assert inner == Location("helpers.h", 2, "ns::inner", helper)
    assert again.inlined_at == Location("helpers.h", 4, "helper", Location("kernel.cu", 9))
    assert str(inner) == ("helpers.h:2 (ns::inner), inlined at helpers.h:4 (helper), inlined at kernel.cu:6")


def test_parameters_are_laid_out_by_alignment():
    text = HEADER + (
        ".visible .entry k(.param .u32 a, .param .u64 .ptr .global .align 16 b, .param .u8 c,"
        ".param .align 64 .b8 map[128]) .reqntid 128, 1, 1 .maxnreg 168 { ret; }"
    )
    function = parse(text).functions["k"]
    assert [(p.name, p.offset, p.bytes) for p in function.parameters] == [
        ("a", 0, 4),
        ("b", 8, 8),
        ("c", 16, 1),
        ("map", 64, 128),
    ]
    assert function.directives == {"reqntid": (128, 1, 1), "maxnreg": (168,)}


def test_variables_and_initializers():
    module = parse(
        HEADER
        + ".const .align 4 .b32 table[3] = {1, -1, 0x10};\n.global .f32 one = 0f3F800000;\n"
        + ".extern .shared .align 16 .b8 smem[];"
    )
    table, one_value, smem = module.variables
    assert table.data == bytes.fromhex("01000000ffffffff10000000")
    assert one_value.data == bytes.fromhex("0000803f")
    assert (smem.space, smem.bytes, smem.align, smem.extern) == ("shared", 0, 16, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add.u32 %r1, %r2 %r3;", "PTX line 5.*';' was expected"),
        ("add.u32 %r1, ?, 2;", "PTX line 5.*begins no token"),
        (".banana 3;", "PTX line 5.*directive .banana"),
    ],
)
def test_errors_name_the_line(text: str, message: str):
    with pytest.raises(PtxSyntaxError, match=message):
        body_of(text)


def test_an_open_body_is_an_error():
    with pytest.raises(PtxSyntaxError, match="not closed"):
        parse(HEADER + ".visible .entry k() { ret;")

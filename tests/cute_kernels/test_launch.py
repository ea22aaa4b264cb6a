"""`launch.c`, which functions are linked with, against a driver that writes down what it is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cute_kernels
import pytest

SOURCE = Path(cute_kernels.__file__).with_name("launch.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler on Linux"
)

# Kernels are numbers: 11 takes an int and a double, 12 a double and an int, 100 and more one int.
FAKE_DRIVER = r"""
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#ifndef CONTEXT
#define CONTEXT 1
#endif
int context = CONTEXT;
struct attribute { unsigned id, pad, value[16]; };
int cuLaunchKernelEx(const unsigned *config, void *kernel, void **pointers, void **extra) {
  if (!context) return 201;
  flockfile(stdout);
  printf("%zu:", (size_t)kernel);
  for (int i = 0; i < 7; ++i) printf(" %u", config[i]);
  void *const *rest = (void *const *)(config + 8);
  const struct attribute *attributes = rest[1];
  printf(" stream %zu", (size_t)rest[0]);
  for (unsigned i = 0; i < *(unsigned *)(rest + 2); ++i)
    printf(" %u=%u,%u", attributes[i].id, attributes[i].value[0], attributes[i].value[1]);
  if (pointers) printf(" pointers %d", *(int *)pointers[0]);
  if (extra) {
    const char *block = extra[1];
    size_t bytes = *(size_t *)extra[3];
    int number = *(int *)(block + ((size_t)kernel == 12 ? 8 : 0));
    double fraction = bytes > 4 ? *(double *)(block + ((size_t)kernel == 12 ? 0 : 8)) : 0;
    printf(" extra %zu %zu block %d %g of %zu", (size_t)extra[0], (size_t)extra[2], number, fraction, bytes);
  }
  puts(extra && extra[4] ? " open" : "");
  funlockfile(stdout);
  return 7;
}
#ifdef TELLS_PARAMETERS
int cuKernelGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *bytes) {
  size_t number = (size_t)kernel;
  if (index > (number < 100)) return 1;
  *offset = 8 * index;
  *bytes = number < 100 && index == (number == 11) ? sizeof(double) : sizeof(int);
  return 0;
}
#endif
"""
CALLER_START = r"""
extern int context;
int _cudaGetDevice(int *device) { *device = 3; return 0; }
int _cudaSetDevice(int device) { context = device == 3; return 0; }
struct attribute { unsigned id, pad, value[16]; };
static int first = 5;
static double second = 0.25;
static int call(size_t kernel) {
  void *both[] = {&first, &second}, *swapped[] = {&second, &first};
  struct attribute attributes[] = {{4, 0, {2, 1, 1}}, {6, 0, {1}}};
  struct runtime_config config = {{1, 2, 3}, {4, 5, 6}, 1024, (void *)8, attributes, 2};
  return _cudaLaunchKernelEx(&config, (void *)kernel, kernel == 12 ? swapped : both);
}
"""
COMMON = "{}: 1 2 3 4 5 6 1024 stream 8 4=2,1 6=1,0 "


def run(folder: Path, main: str, *flags: str, functions: str = "") -> tuple[list[str], int]:
    """What a program with that main function prints through the driver, and its exit status."""
    (folder / "driver.c").write_text(FAKE_DRIVER)
    program = f'#include "{SOURCE}"\n{CALLER_START}\n{functions}\nint main(void) {{ {main} }}\n'
    (folder / "caller.c").write_text(program)
    driver = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c", *flags]
    # Linked to it as well, to reach `context`.
    caller = ["-Wall", "-Wextra", "-Werror", "-o", "caller", "caller.c", "libcuda.so.1", "-ldl", "-pthread"]
    for arguments in (driver, caller):
        subprocess.run([str(COMPILER), *arguments], check=True, cwd=folder)
    done = subprocess.run(
        [folder / "caller"], env={"LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines(), done.returncode


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [(["-DTELLS_PARAMETERS"], "extra 1 2 block 5 {} of 16"), ([], "pointers 5")],
    ids=["block", "old_driver"],
)
def test_a_launch_reaches_the_driver_unchanged(tmp_path: Path, flags: list[str], parameters: str) -> None:
    printed, status = run(tmp_path, "call(11); second = 0.5; return call(11);", *flags)
    assert printed == [COMMON.format(11) + parameters.format(x) for x in ("0.25", "0.5")]
    assert status == 7


def test_each_kernel_of_a_function_has_its_own_parameters(tmp_path: Path) -> None:
    printed, _ = run(tmp_path, "call(11); call(12); call(11); return call(12);", "-DTELLS_PARAMETERS")
    assert (
        printed
        == [
            COMMON.format(11) + "extra 1 2 block 5 0.25 of 16",
            COMMON.format(12) + "extra 1 2 block 5 0.25 of 12",
        ]
        * 2
    )


def test_more_kernels_than_have_room_get_pointers(tmp_path: Path) -> None:
    main = "for (int i = 0; i < 40; ++i) call(100 + i % 20); return 0;"
    printed, _ = run(tmp_path, main, "-DTELLS_PARAMETERS")
    ends = ["extra 1 2 block 5 0 of 4"] * 16 + ["pointers 5"] * 4
    assert printed == [COMMON.format(100 + i % 20) + ends[i % 20] for i in range(40)]


def test_threads_that_launch_together_learn_each_kernel_once(tmp_path: Path) -> None:
    main = r"""
      pthread_t threads[8];
      for (int i = 0; i < 8; ++i) pthread_create(&threads[i], NULL, work, NULL);
      for (int i = 0; i < 8; ++i) pthread_join(threads[i], NULL);
      return num_layouts;
    """
    work = r"""
    #include <pthread.h>
    static void *work(void *nothing) {
      for (int i = 0; i < 100; ++i) call(i % 2 ? 11 : 12);
      return nothing;
    }
    """
    printed, learned = run(tmp_path, main, "-DTELLS_PARAMETERS", functions=work)
    assert learned == 2
    assert len(printed) == 800
    sizes = {11: 16, 12: 12}
    assert set(printed) == {COMMON.format(k) + f"extra 1 2 block 5 0.25 of {n}" for k, n in sizes.items()}


def test_a_thread_without_a_context_gets_that_of_its_device(tmp_path: Path) -> None:
    printed, status = run(tmp_path, "call(11); return call(11);", "-DTELLS_PARAMETERS", "-DCONTEXT=0")
    assert printed == [COMMON.format(11) + "extra 1 2 block 5 0.25 of 16"] * 2
    assert status == 7


def test_without_a_driver_the_launch_says_so(tmp_path: Path) -> None:
    (tmp_path / "caller.c").write_text(
        f'#include "{SOURCE}"\nint context;\n{CALLER_START}\nint main(void) {{ return call(11) == 500; }}\n'
    )
    subprocess.run([str(COMPILER), "-o", "caller", "caller.c", "-ldl"], check=True, cwd=tmp_path)
    (tmp_path / "libcuda.so.1").write_text("no library")
    done = subprocess.run([tmp_path / "caller"], env={"LD_LIBRARY_PATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 1

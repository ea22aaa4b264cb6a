"""Runs, checks and counts GPU kernels on a CPU."""

from ptx_emulator.__about__ import __version__
from ptx_emulator.errors import BuildError, EmulatorError, PtxSyntaxError, UnsupportedInstruction
from ptx_emulator.host.arrays import aligned
from ptx_emulator.host.cuda_source import compile_cuda
from ptx_emulator.host.cute import CuteFiles, Emulated, compile_cute, emulate, ptx_of
from ptx_emulator.host.exploring import Exploration, ScheduleError, explore
from ptx_emulator.host.launching import Launch, Launches, launch
from ptx_emulator.host.tensor_maps import tensor_map
from ptx_emulator.machine import Machine, Result
from ptx_emulator.options import Options
from ptx_emulator.reports import EmulationError, Report

__all__ = [
    "BuildError",
    "CuteFiles",
    "Emulated",
    "EmulationError",
    "EmulatorError",
    "Exploration",
    "Launch",
    "Launches",
    "Machine",
    "Options",
    "PtxSyntaxError",
    "Report",
    "Result",
    "ScheduleError",
    "UnsupportedInstruction",
    "__version__",
    "aligned",
    "compile_cuda",
    "compile_cute",
    "emulate",
    "explore",
    "launch",
    "ptx_of",
    "tensor_map",
]

"""`launch.c`, which compiled kernels are linked with, against a driver that writes down what it is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gdn_mtp.cute
import pytest

SOURCE = Path(gdn_mtp.cute.__file__).with_name("launch.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
FAKE_DRIVER = r"""
#include <stddef.h>
#include <stdio.h>
int cuLaunchKernelEx(const unsigned *config, void *kernel, void **pointers, void **extra) {
  for (int i = 0; i < 7; ++i) printf("%u ", config[i]);
  void *const *rest = (void *const *)(config + 8);
  printf("stream %zu attributes %zu*%u kernel %zu", (size_t)rest[0], (size_t)rest[1], *(unsigned *)(rest + 2),
         (size_t)kernel);
  if (pointers) printf(" pointers %d %g", *(int *)pointers[0], *(double *)pointers[1]);
  if (extra) {
    const char *block = extra[1];
    printf(" extra %zu %zu block %d %g of %zu", (size_t)extra[0], (size_t)extra[2], *(int *)block,
           *(double *)(block + 8), *(size_t *)extra[3]);
  }
  puts(extra && extra[4] ? " open" : "");
  return 7;
}
#ifdef TELLS_PARAMETERS
int cuKernelGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *bytes) {
  if (index > 1) return 1;
  *offset = 8 * index;
  *bytes = index ? sizeof(double) : sizeof(int);
  return 0;
}
#endif
"""
CALLER = r"""
int main(void) {
  int first = 5;
  double second = 0.25;
  void *pointers[] = {&first, &second};
  struct runtime_config config = {{1, 2, 3}, {4, 5, 6}, 1024, (void *)8, (void *)9, 2};
  int status = 0;
  for (int i = 0; i < 2; ++i) {
    status = _cudaLaunchKernelEx(&config, (void *)11, pointers);
    second = 0.5;
  }
  return status;
}
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        (["-DTELLS_PARAMETERS"], "extra 1 2 block 5 {} of 16"),
        ([], "pointers 5 {}"),
    ],
    ids=["block", "old_driver"],
)
def test_a_launch_reaches_the_driver_unchanged(tmp_path, flags, parameters):
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    (tmp_path / "caller.c").write_text(f'#include "{SOURCE}"\n{CALLER}')
    warnings = ["-Wall", "-Wextra", "-Werror"]
    driver = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c", *flags]
    caller = [*warnings, "-o", "caller", "caller.c", "-ldl"]
    for arguments in (driver, caller):
        subprocess.run([COMPILER, *arguments], check=True, cwd=tmp_path)
    done = subprocess.run(
        [tmp_path / "caller"], env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True
    )
    common = "1 2 3 4 5 6 1024 stream 8 attributes 9*2 kernel 11 "
    assert done.stdout.splitlines() == [common + parameters.format(x) for x in ("0.25", "0.5")]
    assert done.returncode == 7

"""What ptxas 13.0 said about real kernels, and their modules in short."""

_TEXT = """\
{first}ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scan_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for scan_mosaic_gpu_kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes \
spill loads
ptxas info    : Used {registers} registers, used 2 barriers, {more}1 bytes smem
ptxas info    : Compile time = 103.772 ms
"""


def _text(first="", stack=0, stores=0, loads=0, registers=168):
  more = f"{stack} bytes cumulative stack size, " if stack else ""
  return _TEXT.format(
    first=first,
    stack=stack,
    stores=stores,
    loads=loads,
    registers=registers,
    more=more,
  )


GOOD = _text()
SPILL = _text(
  "ptxas warning : Registers are spilled to local memory in function "
  "'scan_mosaic_gpu_kernel', 96 bytes spill stores, 108 bytes spill loads\n",
  stack=64,
  stores=96,
  loads=108,
  registers=255,
)
C7511 = _text(
  "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async "
  "instructions are serialized due to insufficient register resources for the "
  "wgmma pipeline in the function 'scan_mosaic_gpu_kernel'\n",
)
C7510 = _text(
  "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async "
  "instructions are serialized due to non wgmma instructions defining "
  "accumulator registers of a wgmma between start and end of the pipeline "
  "stage in the function 'scan_mosaic_gpu_kernel'\n",
)
C7512 = C7510.replace("C7510", "C7512")
# Without its wgmma.wait_group.
NOTE = _text(
  "ptxas info    : (C7517) warpgroup.wait is injected in around line 599 by "
  "compiler to allow use of registers defined by GMMA in function "
  "'scan_mosaic_gpu_kernel'\n"
)
WARNING = _text(
  "ptxas warning : Stack size for entry function 'scan_mosaic_gpu_kernel' "
  "cannot be statically determined\n"
)

PTX = """\
.version 9.0
.target sm_90a
.visible .entry scan_mosaic_gpu_kernel(
)
.maxntid 128, 1, 1
.minnctapersm 1
"""


def module(base: str, shared: int = 197656, constant: int = 0) -> str:
  """Mosaic GPU's module of a kernel, as it is dumped under the name `base`."""
  return f"""\
module @scan attributes {{mosaic_gpu.dump_basename = "{base}"}} {{
  %0 = gpu.launch async [%1] blocks(%a, %b, %c) in (%d = %c16, %e = %c4, \
%f = %c2) threads(%g, %h, %i) in (%j = %c128, %k = %c1, %l = %c1) \
dynamic_shared_memory_size %c{shared}_i32 {{
    %2 = arith.constant {constant} : i32
"""


RESOURCES = (
  "Resources(smem_scratch_bytes=197632, tmem_scratch_cols=0, "
  "tmem_collective_scratch_cols=0)"
)

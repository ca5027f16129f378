"""Listings of machine code in the form of nvdisasm: recorded, and made."""

# The start and some later lines of scan, by nvdisasm 13.5.
RECORDED = """\
	.target	sm_90a
gdn2_scan_mosaic_gpu_kernel:
.text.gdn2_scan_mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
                                                           /* 0x000fe20000000800 */
        /*0010*/                   S2R R10, SR_TID.X ;     /* 0x00000000000a7919 */
                                                           /* 0x000e6e0000002100 */
        /*0a70*/               @P5 BRA `(.L_x_0) ;         /* 0x0000000400c05947 */
                                                           /* 0x002fea0003800000 */
        /*2050*/                   F2FP.BF16.F32.PACK_AB R35, R103, R102 ;  /* 0x000000666723723e */
                                                           /* 0x000fe400000010ff */
.L_x_0:
        /*2060*/                   EXIT ;                  /* 0x000000000000794d */
                                                           /* 0x000fea0003800000 */
"""  # noqa: E501


def line(text, stall=1, *, write=7, read=7, waits=()):
  """One instruction with its control bits."""
  mask = sum(1 << board for board in waits)
  high = stall << 41 | write << 46 | read << 49 | mask << 52
  return (
    f"        /*0000*/                   {text} ;   /* 0x0000000000000000 */\n"
    f"                                              /* 0x{high:016x} */"
  )


def listing(*parts):
  """Listing of instructions as `line` makes them; a bare text stalls one cycle.

  A text that begins with ".L_x_" is a label.
  """
  lines = []
  for part in parts:
    if part.startswith(".L_x_"):
      lines.append(f"{part}:")
    else:
      lines.append(part if "/*" in part else line(part))
  return "\n".join(lines)


BRANCH = "@P0 BRA `(.L_x_1)"
ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"
LOAD = "UTMALDG.3D [UR8], [UR6]"

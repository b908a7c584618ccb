// Puts the software's tiles in the place of the instructions.
#pragma once

#include "amx_shim.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) amx_shim::load_config(config)
#define _tile_release() amx_shim::release()
#define _tile_zero(t) amx_shim::zero(t)
#define _tile_loadd(t, base, stride) amx_shim::load(t, base, stride)
#define _tile_stored(t, base, stride) amx_shim::store(t, base, stride)
#define _tile_dpbf16ps(to, a, b) amx_shim::add_bfloat16(to, a, b)
#define _tile_dpbsud(to, a, b) amx_shim::add_bytes(to, a, b)

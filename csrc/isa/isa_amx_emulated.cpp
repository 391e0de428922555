#define FASTSERVE_ISA_NAMESPACE isa_amx_emulated
#define FASTSERVE_TILES
#define FASTSERVE_TILES_EMULATED
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+v"(v))

#include "vec_avx512.h"

#include "math.h"

#include "../ops.h"

#include "dots.h"

#include "linear.h"

#include "peak.h"

namespace fastserve {
extern const OpTable kTable_amx_emulated;
const OpTable kTable_amx_emulated = {"amx_emulated", isa_amx_emulated::linear, isa_amx_emulated::peak_rate};
}

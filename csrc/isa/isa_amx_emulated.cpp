#define FASTSERVE_ISA_NAMESPACE isa_amx_emulated
#define FASTSERVE_TILES
#define FASTSERVE_TILES_EMULATED
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+v"(v))

#include "vec_avx512.h"

#include "math.h"

#include "../ops.h"

#include "dots.h"

#include "linear.h"

#include "attention.h"

#include "varlen.h"

#include "elementwise.h"

#include "sample.h"

#include "peak.h"

namespace fastserve {
extern const OpTable kTable_amx_emulated;
const OpTable kTable_amx_emulated = {"amx_emulated", isa_amx_emulated::linear, isa_amx_emulated::attention, isa_amx_emulated::varlen, isa_amx_emulated::norm, isa_amx_emulated::rope, isa_amx_emulated::store, isa_amx_emulated::heads, isa_amx_emulated::gather,
                             isa_amx_emulated::argmax, isa_amx_emulated::sample, isa_amx_emulated::most_probable, isa_amx_emulated::peak_rate, isa_amx_emulated::read_memory};
}

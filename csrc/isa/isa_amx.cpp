#define FASTSERVE_ISA_NAMESPACE isa_amx
#define FASTSERVE_TILES
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
extern const OpTable kTable_amx;
const OpTable kTable_amx = {"amx", isa_amx::linear, isa_amx::attention, isa_amx::varlen, isa_amx::norm, isa_amx::rope, isa_amx::store, isa_amx::heads, isa_amx::gather,
                             isa_amx::argmax, isa_amx::sample, isa_amx::most_probable, isa_amx::peak_rate, isa_amx::read_memory};
}

#define FASTSERVE_ISA_NAMESPACE isa_avx512
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
extern const OpTable kTable_avx512;
const OpTable kTable_avx512 = {"avx512", isa_avx512::linear, isa_avx512::attention, isa_avx512::varlen, isa_avx512::norm, isa_avx512::rope, isa_avx512::store, isa_avx512::heads, isa_avx512::gather,
                             isa_avx512::argmax, isa_avx512::sample, isa_avx512::most_probable, isa_avx512::peak_rate, isa_avx512::read_memory};
}

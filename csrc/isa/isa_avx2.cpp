#define FASTSERVE_ISA_NAMESPACE isa_avx2
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+x"(v))

#include "vec_avx2.h"

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
extern const OpTable kTable_avx2;
const OpTable kTable_avx2 = {"avx2", isa_avx2::linear, isa_avx2::attention, isa_avx2::varlen, isa_avx2::norm, isa_avx2::rope, isa_avx2::store, isa_avx2::heads, isa_avx2::gather,
                             isa_avx2::argmax, isa_avx2::sample, isa_avx2::most_probable, isa_avx2::peak_rate, isa_avx2::read_memory};
}

#define FASTSERVE_ISA_NAMESPACE isa_avx2
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+x"(v))

#include "vec_avx2.h"

#include "math.h"

#include "../ops.h"

#include "dots.h"

#include "linear.h"

#include "peak.h"

namespace fastserve {
extern const OpTable kTable_avx2;
const OpTable kTable_avx2 = {"avx2", isa_avx2::linear, isa_avx2::peak_rate};
}

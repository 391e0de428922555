#define FASTSERVE_ISA_NAMESPACE isa_plain
#if defined(__x86_64__)
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+w"(v))
#else
#define FASTSERVE_OPAQUE(v) asm volatile("" : "+m"(v))
#endif

#include "vec_plain.h"

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
extern const OpTable kTable_plain;
const OpTable kTable_plain = {"plain", isa_plain::linear, isa_plain::attention, isa_plain::varlen, isa_plain::norm, isa_plain::rope, isa_plain::store, isa_plain::heads, isa_plain::gather,
                             isa_plain::argmax, isa_plain::sample, isa_plain::most_probable, isa_plain::peak_rate, isa_plain::read_memory};
}

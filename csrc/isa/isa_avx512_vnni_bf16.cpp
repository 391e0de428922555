#define FASTSERVE_ISA_NAMESPACE isa_avx512_vnni_bf16
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
extern const OpTable kTable_avx512_vnni_bf16;
const OpTable kTable_avx512_vnni_bf16 = {"avx512_vnni_bf16", isa_avx512_vnni_bf16::linear, isa_avx512_vnni_bf16::attention, isa_avx512_vnni_bf16::varlen, isa_avx512_vnni_bf16::norm, isa_avx512_vnni_bf16::rope, isa_avx512_vnni_bf16::store, isa_avx512_vnni_bf16::heads, isa_avx512_vnni_bf16::gather,
                             isa_avx512_vnni_bf16::argmax, isa_avx512_vnni_bf16::sample, isa_avx512_vnni_bf16::most_probable, isa_avx512_vnni_bf16::peak_rate, isa_avx512_vnni_bf16::read_memory};
}

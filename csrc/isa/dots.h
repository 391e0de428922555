// The innermost step of a matrix product: one word of packed weight against four bytes of activation.
//
// A word (32 bits per column, see packed_weight.h) is split into parts; each part meets four bytes of each row's
// activations: one float, two bfloat16, or four signed bytes. A Dot says how many parts its words have, how to make
// them, and how to multiply. `Native` is the Dot whose words are this one's parts: what an unpacked panel holds.
#pragma once

namespace fastserve::FASTSERVE_ISA_NAMESPACE {

// Float activations.
struct FloatDot {
    using Acc = F;
    using Part = F;
    static constexpr bool kInteger = false;
    static F zero() { return f_zero(); }
    static F broadcast(const char* a) {
        float v;
        std::memcpy(&v, a, 4);
        return f_set(v);
    }
    static F multiply(F acc, F part, F a) { return f_fma(part, a, acc); }
    static F load(const float* p) { return f_load(p); }
    static void store(float* p, F v) { f_store(p, v); }
    static void store_part(void* p, F v) { f_store(static_cast<float*>(p), v); }
};

struct FloatF32 : FloatDot {
    using Native = FloatF32;
    static constexpr int kParts = 1;
    explicit FloatF32(const PackedWeight&) {}
    template <int P> F part(I word) const { return f_bits(word); }
};

struct FloatBf16 : FloatDot {
    using Native = FloatBf16;  // widening costs less than a trip through memory
    static constexpr int kParts = 2;
    explicit FloatBf16(const PackedWeight&) {}
    template <int P> F part(I word) const {
        return f_bits(P == 0 ? i_shl<16>(word) : i_and(word, i_set(static_cast<int>(0xffff0000u))));
    }
};

struct FloatU8 : FloatDot {
    using Native = FloatF32;
    static constexpr int kParts = 4;
    explicit FloatU8(const PackedWeight&) {}
    template <int P> F part(I word) const {
        return f_convert(i_sub(i_and(i_shr<8 * P>(word), i_set(255)), i_set(128)));
    }
};

// Four-bit words: part P is the nibble of k = P, see packed_weight.h.
template <int P> static inline I nibble(I word) { return i_shr<P % 2 ? 16 + 2 * (P - 1) : 2 * P>(word); }

struct FloatU4 : FloatDot {
    using Native = FloatF32;
    static constexpr int kParts = 8;
    explicit FloatU4(const PackedWeight&) {}
    template <int P> F part(I word) const { return f_convert(i_sub(i_and(nibble<P>(word), i_set(15)), i_set(8))); }
};

struct FloatC4 : FloatDot {
    using Native = FloatF32;
    static constexpr int kParts = 8;
    Table table;
    explicit FloatC4(const PackedWeight& weight) : table(weight.table) {}
    template <int P> F part(I word) const { return table.look_up(i_and(nibble<P>(word), i_set(15))); }
};

// Signed 8-bit activations; exact integer sums, so every instruction set gives the same.
struct ByteDot {
    using Acc = I;
    using Part = I;
    static constexpr bool kInteger = true;
    static I zero() { return i_zero(); }
    static I broadcast(const char* a) {
        int32_t v;
        std::memcpy(&v, a, 4);
        return i_set(v);
    }
    static I multiply(I acc, I part, I a) { return i_dot(acc, part, a); }
    static I load(const float* p) { return i_load(p); }
    static void store(float* p, I v) { i_store(p, v); }
    static void store_part(void* p, I v) { i_store(p, v); }
};

struct ByteU8 : ByteDot {
    using Native = ByteU8;
    static constexpr int kParts = 1;
    explicit ByteU8(const PackedWeight&) {}
    template <int P> I part(I word) const { return word; }
};

// Part 0 holds k = 0 4 1 5 of each eight, part 1 k = 2 6 3 7; `reorder_u4` puts the activations into this order.
struct ByteU4 : ByteDot {
    using Native = ByteU8;
    static constexpr int kParts = 2;
    explicit ByteU4(const PackedWeight&) {}
    template <int P> I part(I word) const { return i_and(i_shr<4 * P>(word), i_set(0x0f0f0f0f)); }
};

#if defined(__AVX512BF16__)
// bfloat16 activations, two at a time, summed in float.
struct PairDot {
    using Acc = F;
    using Part = I;
    static constexpr bool kInteger = false;
    static F zero() { return f_zero(); }
    static I broadcast(const char* a) { return ByteDot::broadcast(a); }
    static F multiply(F acc, I part, I a) { return f_dot(acc, part, a); }
    static F load(const float* p) { return f_load(p); }
    static void store(float* p, F v) { f_store(p, v); }
    static void store_part(void* p, I v) { i_store(p, v); }
};

struct PairBf16 : PairDot {
    using Native = PairBf16;
    static constexpr int kParts = 1;
    explicit PairBf16(const PackedWeight&) {}
    template <int P> I part(I word) const { return word; }
};

struct PairU8 : PairDot {
    using Native = PairBf16;
    static constexpr int kParts = 2;
    explicit PairU8(const PackedWeight&) {}
    // q - 128 has eight bits: exact in bfloat16, so a float's upper half holds it. The float is made of q below the bits
    // of 2^23, less those.
    template <int P> I part(I word) const {
        const F even = centred(widen<2 * P>(word)), odd = centred(widen<2 * P + 1>(word));
        return upper_halves(i_bits(even), i_bits(odd));
    }
    // Two floats as two bfloat16 in a word; what lies below is lost.
    static I upper_halves(I low, I high) {
        return _mm512_mask_shuffle_epi8(high, 0x3333333333333333u, low, i_add(byte_places(), i_set(0x0302)));
    }

private:
    static F centred(I bits) { return f_sub(f_bits(bits), f_set(8388608.0f + 128.0f)); }
    // Byte N of each word, below the bits of 2^23.
    template <int N> static I widen(I word) {
        const I from = i_add(byte_places(), i_set(N));
        return _mm512_mask_shuffle_epi8(i_set(0x4b000000), 0x1111111111111111u, word, from);
    }
    // In every word the index of its first byte, among the sixteen that a shuffle reaches.
    static I byte_places() { return _mm512_set4_epi32(0x0c0c, 0x0808, 0x0404, 0x0000); }
};

static const float kCentredU4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

struct PairNibbles : PairDot {
    using Native = PairBf16;
    static constexpr int kParts = 4;
    PairTable table;
    explicit PairNibbles(const PackedWeight& weight) : table(weight.format == Format::c4 ? weight.table : kCentredU4) {}
    template <int P> I part(I word) const { return table.look_up(i_shr<4 * P>(word)); }
};
#endif

}  // namespace fastserve::FASTSERVE_ISA_NAMESPACE

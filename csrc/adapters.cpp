#include "adapters.h"

#include <algorithm>
#include <stdexcept>

#include "packed_weight.h"

namespace fastserve {

namespace {

void put(uint8_t* values, DType type, int64_t index, float value) {
    if (type == DType::f32) {
        reinterpret_cast<float*>(values)[index] = value;
    } else {
        reinterpret_cast<uint16_t*>(values)[index] = f32_to_bf16(value);
    }
}

}  // namespace

Adapters::Adapters(const PackedWeight& weight, int64_t num_slots)
    : weight_(weight), memory_(static_cast<size_t>(num_slots)), all_(static_cast<size_t>(num_slots)), slots_(all_.data()) {}

void Adapters::set(int64_t slot, int64_t ranks, const float* a, const float* b, DType type) {
    Memory memory;
    const int64_t size = element_bytes(type), columns = weight_.columns;
    memory.a = Buffer(static_cast<size_t>(ranks * weight_.k * size));
    for (int64_t i = 0; i < ranks * weight_.k; ++i) put(memory.a.data(), type, i, a[i]);
    int64_t offset = 0;
    for (int64_t column = 0; column < columns; column += kColumnMultiple) {
        int64_t first = ranks, last = 0;
        for (int64_t i = column; i < column + kColumnMultiple; ++i) {
            const int64_t row = weight_.source_row(i);
            for (int64_t rank = 0; row >= 0 && rank < ranks; ++rank) {
                if (b[row * ranks + rank] != 0.0f) first = min_of(first, rank), last = max_of(last, rank + 1);
            }
        }
        const int64_t count = max_of(0, last - first);
        memory.strips.push_back({min_of(first, last), count, offset});
        offset += count * kColumnMultiple;
    }
    memory.b = Buffer(static_cast<size_t>(max_of(offset, 1) * size));
    for (int64_t column = 0; column < columns; ++column) {
        const AdapterStrip& strip = memory.strips[static_cast<size_t>(column / kColumnMultiple)];
        const int64_t row = weight_.source_row(column);
        for (int64_t rank = 0; row >= 0 && rank < strip.ranks; ++rank) {
            put(memory.b.data(), type, strip.offset + rank * kColumnMultiple + column % kColumnMultiple,
                b[row * ranks + strip.first_rank + rank]);
        }
    }
    Memory& kept = memory_.at(static_cast<size_t>(slot)) = std::move(memory);
    all_[static_cast<size_t>(slot)] = {type, ranks, kept.a.data(), kept.b.data(), kept.strips.data()};
    count_ranks();
}

void Adapters::clear(int64_t slot) {
    memory_.at(static_cast<size_t>(slot)) = Memory();
    all_[static_cast<size_t>(slot)] = {};
    count_ranks();
}

void Adapters::count_ranks() {
    max_ranks_ = 0;
    for (const AdapterSlot& slot : all_) max_ranks_ = max_of(max_ranks_, slot.ranks);
}

int64_t Adapters::bytes() const {
    int64_t total = 0;
    for (const Memory& memory : memory_) total += static_cast<int64_t>(memory.a.bytes() + memory.b.bytes());
    return total;
}

}  // namespace fastserve

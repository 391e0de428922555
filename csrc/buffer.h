// Memory for weights and scratch: 64-byte aligned, on huge pages where the system allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastserve {

class Buffer {
public:
    Buffer() = default;
    // Zero-filled. Throws std::bad_alloc.
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    uint8_t* data() { return data_; }
    const uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    // Make room for at least `bytes`; what was in it is lost when it grows.
    void reserve(size_t bytes) {
        if (bytes > bytes_) *this = Buffer(bytes + bytes / 4);
    }

private:
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
    size_t mapped_ = 0;  // bytes given by mmap; 0: from aligned_alloc
};

}  // namespace fastserve

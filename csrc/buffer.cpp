#include "buffer.h"

#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastserve {

namespace {
constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
}  // namespace

Buffer::Buffer(size_t bytes) {
    if (bytes == 0) return;
#ifdef __linux__
    if (bytes >= kHugePage) {
        // Whole huge pages, at a huge-page boundary: map one page more and give the ends back.
        size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        void* raw = mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (raw == MAP_FAILED) throw std::bad_alloc();
        uintptr_t start = reinterpret_cast<uintptr_t>(raw);
        uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
        if (aligned > start) munmap(raw, aligned - start);
        uintptr_t end = start + wanted + kHugePage;
        if (end > aligned + wanted) munmap(reinterpret_cast<void*>(aligned + wanted), end - aligned - wanted);
        data_ = reinterpret_cast<uint8_t*>(aligned);
        madvise(data_, wanted, MADV_HUGEPAGE);  // a wish: small pages work too
        mapped_ = wanted;
        bytes_ = bytes;
        return;
    }
#endif
    size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, rounded);
    bytes_ = bytes;
}

Buffer::~Buffer() {
#ifdef __linux__
    if (mapped_) {
        munmap(data_, mapped_);
        return;
    }
#endif
    std::free(data_);
}

}  // namespace fastserve

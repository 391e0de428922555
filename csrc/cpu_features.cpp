#include "cpu_features.h"

#include <cstdint>

#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastserve {

#if defined(__x86_64__)
namespace {

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (__get_cpuid_max(leaf & 0x80000000u, nullptr) < leaf) return r;
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

bool bit(unsigned value, int index) { return (value >> index) & 1u; }

uint64_t saved_state() {
    if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool made_by_amd() {
    const Registers vendor = cpuid(0, 0);
    return vendor.ebx == 0x68747541 && vendor.edx == 0x69746e65 && vendor.ecx == 0x444d4163;  // "Auth" "enti" "cAMD"
}

bool amx_permitted() {
#ifdef __linux__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

const bool kFetchPastCaches = made_by_amd();

std::vector<std::string> available_isas() {
    std::vector<std::string> names{"plain"};
    Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    uint64_t state = saved_state();
    bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    bool fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29);
    if (!ymm || !fma || !f16c || !bit(seven.ebx, 5)) return names;
    names.push_back("avx2");
    bool foundation = bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
    if (!zmm || !foundation) return names;
    names.push_back("avx512");
    if (!bit(seven.ecx, 11) || !bit(seven_one.eax, 5)) return names;
    names.push_back("avx512_vnni_bf16");
    if (tiles && bit(seven.edx, 22) && bit(seven.edx, 24) && bit(seven.edx, 25) && amx_permitted()) {
        names.push_back("amx");
    }
    return names;
}
#else
const bool kFetchPastCaches = false;

std::vector<std::string> available_isas() { return {"plain"}; }
#endif

}  // namespace fastserve

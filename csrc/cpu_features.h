// Which instruction sets this machine and its operating system allow, best last.
#pragma once

#include <string>
#include <vector>

namespace fastserve {

// Names, worst first: "plain", "avx2", "avx512", "avx512_vnni_bf16", "amx". An ISA is listed when the processor has it,
// the system saves its registers, and (AMX) the kernel granted the tile registers to this process.
std::vector<std::string> available_isas();

}  // namespace fastserve

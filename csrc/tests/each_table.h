// Every table of operations that this machine can run, one after the other.
#pragma once

#include <cstdio>

#include "check.h"
#include "../ops.h"

namespace fastserve {

template <typename Check>
void for_each_table(const char* what, Check check) {
    int tables = 0;
    for (const char* isa : {"plain", "avx2", "avx512", "avx512_vnni_bf16", "amx_emulated", "amx"}) {
        const OpTable* table = op_table(isa);
        if (!table) {
            std::printf("%s: %s is not available here\n", what, isa);
            continue;
        }
        ++tables;
        check(*table);
        std::printf("%s: %s ok\n", what, isa);
    }
    CHECK(tables > 0, "no instruction set at all");
}

}  // namespace fastserve

#include "isa.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace waterfill {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx512vbmi() {
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512vbmi() { return false; }
#endif

bool has_neon() {  // with dot products
#if defined(__aarch64__) && defined(__APPLE__)
    return true;
#elif defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;
#endif
}

bool has_cpp() { return true; }

struct Isa {
    const char* name;
    const Functions* (*functions)();
    bool (*machine_has)();
};

const Isa kIsas[] = {
    {"avx512vbmi", avx512vbmi_functions, has_avx512vbmi},
    {"avx512", avx512_functions, has_avx512},
    {"avx2", avx2_functions, has_avx2},
    {"neon", neon_functions, has_neon},
    {"scalar", scalar_functions, has_cpp},
};
constexpr int kIsaCount = int(sizeof kIsas / sizeof kIsas[0]);

bool known(int isa) { return isa >= 0 && isa < kIsaCount; }

}  // namespace

const Functions* functions(int isa) { return known(isa) ? kIsas[isa].functions() : nullptr; }

const char* isa_name(int isa) { return known(isa) ? kIsas[isa].name : nullptr; }

bool isa_usable(int isa) { return known(isa) && kIsas[isa].machine_has() && functions(isa); }

}  // namespace waterfill

#include "matrix.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#include "avx512.hpp"

namespace waterfill {
const Functions* avx512vbmi_functions() { return Kernels<Avx512<true>>::functions("avx512vbmi"); }
}  // namespace waterfill
#else
namespace waterfill {
const Functions* avx512vbmi_functions() { return nullptr; }
}  // namespace waterfill
#endif

#include "matrix.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "avx512.hpp"

namespace waterfill {
const Functions* avx512_functions() { return Kernels<Avx512<false>>::functions("avx512"); }
}  // namespace waterfill
#else
namespace waterfill {
const Functions* avx512_functions() { return nullptr; }
}  // namespace waterfill
#endif

// The instruction sets by number: api.cpp chooses.
#pragma once

#include "matrix.hpp"

namespace waterfill {

const Functions* functions(int isa);  // null where the number or the build has none

}  // namespace waterfill

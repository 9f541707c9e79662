// The instruction sets by number, best first: those that this build lacks, and those that this machine lacks, too.
#pragma once

#include "matrix.hpp"

namespace waterfill {

const Functions* functions(int isa);  // null where the number or the build has none
const char* isa_name(int isa);        // null where there is none of that number
bool isa_usable(int isa);             // by this build, on this machine

}  // namespace waterfill

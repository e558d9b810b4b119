// Which instruction set's kernels this process runs.
#pragma once

#include "cpu/kernels.h"

namespace tde {

const char* cpu_instruction_set();

}  // namespace tde

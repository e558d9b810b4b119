// What CPU this is, and which instruction set's kernels this process runs on it.
#pragma once

#include "cpu/kernels.h"

namespace tde {

const char* cpu_instruction_set();
bool runs_on_intel();

}  // namespace tde

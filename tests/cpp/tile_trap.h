// The tile instructions of AMX on a processor that refuses them: each raises SIGILL, and the
// handler does what the instruction would, on registers of its own. So the machine code of the
// kernels runs, with its registers, addresses and strides, one instruction at a time.
#pragma once

namespace accelrt::tiles {

// For the process. Of the instructions, those of accelrt/tiles.h and sttilecfg are known, with
// registers of full size.
void install_trap();

// Instructions that were trapped, of all threads.
long trapped();

}  // namespace accelrt::tiles

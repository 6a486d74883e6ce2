#include "tile_trap.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "tile_model.h"

namespace accelrt::tiles {
namespace {

std::atomic<long> g_count{0};

struct Registers {
  uint8_t config[64];  // zeros: released
  Tile tiles[8];
};
thread_local Registers t_registers;

[[noreturn]] void refuse(const char* why) {
  const ssize_t written = write(STDERR_FILENO, why, std::strlen(why));
  std::_Exit(written > 0 ? 3 : 4);
}

int64_t& register_of(mcontext_t& context, int number) {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return reinterpret_cast<int64_t&>(context.gregs[kOrder[number]]);
}

// An instruction with a three-byte VEX prefix.
struct Instruction {
  Instruction(const uint8_t* at, mcontext_t& context) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) refuse("an illegal instruction that is no tile's\n");
    const int x = at[1] & 0x40 ? 0 : 8;
    const int b = at[1] & 0x20 ? 0 : 8;
    third = ~(at[2] >> 3) & 15;
    prefix = at[2] & 3;
    opcode = at[3];
    const int mod = at[4] >> 6;
    reg = at[4] >> 3 & 7;
    rm = at[4] & 7;
    in_memory = mod != 3;
    length = 5;
    if (!in_memory) return;
    bool relative = false;
    bool has_base = true;
    if (rm == 4) {
      const int sib = at[length++];
      const int index = (sib >> 3 & 7) + x;
      if (index != 4) stride = register_of(context, index) << (sib >> 6);
      has_base = mod != 0 || (sib & 7) != 5;
      if (has_base) address = register_of(context, (sib & 7) + b);
    } else if (mod == 0 && rm == 5) {
      relative = true;
      has_base = false;
    } else {
      address = register_of(context, rm + b);
    }
    if (mod == 1) {
      address += static_cast<int8_t>(at[length++]);
    } else if (mod == 2 || !has_base) {
      int32_t offset;
      std::memcpy(&offset, at + length, 4);
      length += 4;
      address += offset;
    }
    if (relative) address += reinterpret_cast<int64_t>(at + length);
  }

  int third = 0;  // VEX.vvvv
  int prefix = 0;
  int opcode = 0;
  int reg = 0;
  int rm = 0;
  int length = 0;
  bool in_memory = false;
  int64_t address = 0;  // without the index, which is the stride of a tile's rows
  int64_t stride = 0;
};

enum Prefix { kNone = 0, k66 = 1, kF3 = 2, kF2 = 3 };

void load_config(const void* from) {
  uint8_t expected[64] = {};
  expected[0] = 1;
  for (int i = 0; i < 8; ++i) {
    expected[16 + 2 * i] = 64;
    expected[48 + i] = 16;
  }
  if (std::memcmp(from, expected, 64) != 0)
    refuse("ldtilecfg of other shapes than 16 x 64 bytes\n");
  t_registers = {};
  std::memcpy(t_registers.config, from, 64);
}

void execute(const Instruction& i) {
  auto& [config, tiles] = t_registers;
  char* const memory = reinterpret_cast<char*>(i.address);
  if (i.opcode == 0x49 && i.prefix == kNone && i.in_memory && i.reg == 0)
    return load_config(memory);
  if (i.opcode == 0x49 && i.prefix == k66 && i.in_memory && i.reg == 0) {
    std::memcpy(memory, config, 64);
    return;
  }
  if (i.opcode == 0x49 && i.prefix == kNone && !i.in_memory && i.reg == 0 && i.rm == 0) {
    t_registers = {};  // tilerelease
    return;
  }
  if (config[0] == 0) refuse("a tile instruction without ldtilecfg\n");
  Tile& tile = tiles[i.reg];
  if (i.opcode == 0x49 && i.prefix == kF2 && !i.in_memory) {
    tile = {};
  } else if (i.opcode == 0x4b && i.prefix == kF2 && i.in_memory && i.rm == 4) {
    for (int r = 0; r < 16; ++r) std::memcpy(tile.words[r], memory + r * i.stride, 64);
  } else if (i.opcode == 0x4b && i.prefix == kF3 && i.in_memory && i.rm == 4) {
    for (int r = 0; r < 16; ++r) std::memcpy(memory + r * i.stride, tile.words[r], 64);
  } else if (i.opcode == 0x5c && i.prefix == kF3 && !i.in_memory) {
    if (i.reg == i.rm || i.reg == i.third || i.rm == i.third)
      refuse("tdpbf16ps of one tile twice\n");
    model_tdpbf16ps(tile, tiles[i.rm], tiles[i.third]);
  } else {
    refuse("an illegal instruction that is none of the known tile instructions\n");
  }
}

void handle(int, siginfo_t*, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* at = reinterpret_cast<const uint8_t*>(machine.gregs[REG_RIP]);
  const Instruction instruction(at, machine);
  execute(instruction);
  machine.gregs[REG_RIP] += instruction.length;
  g_count.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

void install_trap() {
  struct sigaction action = {};
  action.sa_sigaction = &handle;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) refuse("no handler of SIGILL\n");
}

long trapped() { return g_count.load(); }

}  // namespace accelrt::tiles

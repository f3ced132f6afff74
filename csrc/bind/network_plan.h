// What a network runs, without addresses: the launches of all its steps and where their pointers
// point. Made once for a program, an input's shape and a device; a run only fills pointers in.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "bind/program.h"
#include "kernels.h"

namespace torch_mbv2::bind {

// The memory that a network reads and writes. Copies of the input, in another layout or dtype, come
// behind these.
enum Base : int { kInputBase, kWeightsBase, kOutputBase, kScratchBase, kFirstCopyBase };
constexpr int kMostCopies = 2;
constexpr int kBases = kFirstCopyBase + kMostCopies;
using Bases = std::array<char*, kBases>;

// A pointer in the arguments of a launch.
struct Relocation {
  uint16_t at;
  uint16_t base;
  int64_t offset;
};

struct PlannedLaunch {
  Launch launch;
  int step;  // from 1
  std::vector<Relocation> relocations;

  // Whether it points to memory that is another one in every run.
  bool is_outer() const;
  // Writes its arguments, with pointers into `bases`, to `data`, launch.bytes of it.
  void fill(const Bases& bases, unsigned char* data) const;
};

// A copy of the input that steps need.
struct InputCopy {
  ScalarType type;
  Layout layout;
};

// Why something other than an op's own kernel runs.
struct Note {
  int step;
  std::string reason;
};

struct NetworkPlan {
  std::vector<PlannedLaunch> launches;
  std::vector<InputCopy> copies;
  std::vector<Note> notes;
  int64_t scratch_bytes;
  // The result.
  ScalarType type;
  Ints sizes;
  Layout layout;
};

// `input.data` tells no more than the alignment of the input. With `live`, `device` is the current
// one, and its kernels are made ready to launch.
NetworkPlan plan_network(std::string_view program, const Value& input, int64_t weights_bytes,
                         const Device& device, bool live);

}  // namespace torch_mbv2::bind

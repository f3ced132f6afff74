// Runs resident_product of csrc/conv_pool/resident.cuh with symbols for numbers, as far as the
// order of its sums goes, for groups of 1 to 40 images of the pixels given. Exit status 1, and what
// is wrong, unless each pixel of each image is added once, and the sums of all images are the same,
// bit by bit, in every group.
//
//   pixel_order FIRST_PIXELS LAST_PIXELS
#include "plan/pixel_order.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace torch_mbv2;

namespace {

constexpr int kStageRows = 32;  // of resident.cuh
constexpr int kStageOctets = kStageRows / kOctet;

// The result of additions: equal only if the same numbers were added in the same order. All that
// holds in floating point is that a + b = b + a, and that 0 + a = a.
using Symbol = uint64_t;

Symbol mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

Symbol sum_of(Symbol a, Symbol b) {
  if (a == 0 || b == 0) return a + b;
  return mixed(std::min(a, b) + mixed(std::max(a, b)));
}

#define CHECK(condition)                                                               \
  if (!(condition)) {                                                                  \
    std::printf("%d images of %d pixels: not %s\n", images, order.pixels, #condition); \
    std::exit(1);                                                                      \
  }

// The sum of every image of a group.
std::vector<Symbol> run(const PixelOrder& order, int images) {
  const int octets = order.total(images);
  const int stages = (octets + kStageOctets - 1) / kStageOctets;

  // What the copies bring: the pixel in every slot.
  std::vector<ImagePixel> slots(stages * kStageRows);
  std::vector<int> copies(images * order.pixels);
  for (int row = 0; row < kStageRows; ++row) {
    OctetPosition next(order);
    next.advance(order, row / kOctet);
    for (int stage = 0; stage < stages; ++stage) {
      const ImagePixel from = next.at(order, row % kOctet);
      const bool inside = from.image < images && from.pixel < order.pixels;
      CHECK(from.image >= 0 && from.pixel >= 0);
      slots[stage * kStageRows + row] = inside ? from : ImagePixel{-1, -1};
      if (inside) ++copies[from.image * order.pixels + from.pixel];
      next.advance(order, kStageOctets);
    }
  }
  for (const int count : copies) CHECK(count == 1);

  // What the lanes q add.
  std::vector<Symbol> totals;
  std::vector<int> additions(images * order.pixels);
  Symbol sum[4] = {};
  std::vector<ImagePixel> remaining(kOctet, ImagePixel{-1, -1});
  OctetPosition now(order);
  const auto take = [&](const ImagePixel& p) {
    CHECK(p.image == now.image && p.image < images);
    ++additions[p.image * order.pixels + p.pixel];
    return mixed(p.pixel);
  };
  for (int octet = 0; octet < 2 * ((octets + 1) / 2) && now.image < images; ++octet) {
    const ImagePixel* const slot = &slots[octet * kOctet];
    if (now.octet < 0) {
      remaining.assign(slot, slot + kOctet);
    } else {
      for (int q = 0; q < 4; ++q) {
        sum[q] = sum_of(sum[q], sum_of(take(slot[2 * q]), take(slot[2 * q + 1])));
      }
    }
    for (++now.octet; now.at_end(order) && now.image < images; now.next_image(order)) {
      for (int q = 0; q < 4; ++q) {
        Symbol two[2] = {};
        for (int e = 0; e < 2; ++e) {
          if (order.holds(now.image, 2 * q + e)) two[e] = take(remaining[2 * q + e]);
        }
        sum[q] = sum_of(sum[q], sum_of(two[0], two[1]));
      }
      // sum_lanes: values 0 and 1 end in lanes 0 and 1, which add the same lanes.
      const Symbol pairs[2] = {sum_of(sum[0], sum[2]), sum_of(sum[1], sum[3])};
      totals.push_back(sum_of(pairs[0], pairs[1]));
      std::fill(sum, sum + 4, 0);
    }
  }
  CHECK(int(totals.size()) == images);
  for (const int count : additions) CHECK(count == 1);
  return totals;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  for (int pixels = std::atoi(argv[1]); pixels <= std::atoi(argv[2]); ++pixels) {
    const PixelOrder order(pixels);
    const Symbol alone = run(order, 1).front();
    for (int images = 1; images <= 40; ++images) {
      for (const Symbol total : run(order, images)) CHECK(total == alone);
    }
    std::printf("%d: %d octets for 8 images\n", pixels, order.total(8));
  }
}

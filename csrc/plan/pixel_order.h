// In which order resident_product takes the pixels of a group of images, such that the sums of an
// image depend neither on its place in the group nor on the other images. No CUDA needed.
//
// The pixels are columns of products of 8 columns: slots of an octet. Slots 2q and 2q + 1 of every
// octet belong to lanes q. A lane adds them to each other, that to its sum, octet after octet; at
// the end of an image the four lanes' sums are added to each other pairwise.
//
// - The octets of an image follow each other and hold pixels 8h ... 8h + 7 each. Whether an octet
//   is the first or the second half of a tile of 16 pixels makes no difference: it is added after
//   the one before it.
// - The pixels that remain behind an image's last octet would waste most of another. So 8 / w
//   images that follow each other share an octet, which precedes them: w, a power of two, is the
//   room of each. What remains of image i takes slots from (i * w) % 8 on, and is added to the sum
//   of the image last.
// - These pixels are thus in other lanes for each image that shares the octet, but the sum of a
//   lane must be of the same pixels for all. So all pixels of image i change places: pixel p takes
//   slot p % 8 XOR (i * w) % 8 of its octet. That exchanges the two slots of a lane, or the lanes
//   of a pair, or the pairs, which leaves every sum as it is, since a + b = b + a.
//
// Only the room of w slots that remaining pixels leave empty is wasted: nothing of square images,
// of which 0, 1 or 4 pixels remain, for which w is 8, 1 or 4.
#pragma once

namespace torch_mbv2 {

constexpr int kOctet = 8;

struct PixelOrder {
  int pixels;     // of an image, at least 1
  int octets;     // of an image, all its own
  int room_bits;  // the logarithm of w; that of 8 if no pixels remain

  PixelOrder() = default;
  explicit constexpr PixelOrder(int image_pixels)
      : pixels(image_pixels), octets(image_pixels / kOctet), room_bits(0) {
    const int remaining = image_pixels % kOctet == 0 ? kOctet : image_pixels % kOctet;
    while ((1 << room_bits) < remaining) ++room_bits;
  }

  // Whether there are shared octets.
  constexpr bool remain() const { return pixels != octets * kOctet; }

  // What is XORed to p % 8 for the slot of a pixel of an image.
  constexpr int flip(int image) const { return (image << room_bits) & (kOctet - 1); }

  // Whether a shared octet precedes the image.
  constexpr bool opens_shared(int image) const { return remain() && flip(image) == 0; }

  // Whether a slot of the shared octet holds a pixel of the image.
  constexpr bool holds(int image, int slot) const {
    return (slot ^ flip(image)) < pixels - octets * kOctet;
  }

  // Octets of a group.
  constexpr int total(int images) const {
    if (!remain()) return images * octets;
    const int sharing = kOctet >> room_bits;
    return images * octets + (images + sharing - 1) / sharing;
  }
};

struct ImagePixel {
  int image, pixel;  // there is none if either is beyond the last
};

// An octet of the order.
struct OctetPosition {
  int image;
  int octet;  // of the image; -1: the shared octet that precedes the image

  explicit constexpr OctetPosition(const PixelOrder& order)
      : image(0), octet(order.opens_shared(0) ? -1 : 0) {}

  // What a slot of the octet holds.
  constexpr ImagePixel at(const PixelOrder& order, int slot) const {
    if (octet >= 0) return {image, octet * kOctet + (slot ^ order.flip(image))};
    return {image + (slot >> order.room_bits),
            order.octets * kOctet + (slot & ((1 << order.room_bits) - 1))};
  }

  // On to the octet that is `count` octets later.
  constexpr void advance(const PixelOrder& order, int count) {
    octet += count;
    while (octet >= order.octets) next_image(order);
  }

  // Whether the octets of the image are behind.
  constexpr bool at_end(const PixelOrder& order) const { return octet == order.octets; }

  constexpr void next_image(const PixelOrder& order) {
    ++image;
    octet -= order.octets + order.opens_shared(image);
  }
};

}  // namespace torch_mbv2

// The source of a tile with its halo: where its pixels go in the expanded map, and its way to
// shared memory from a map or from an image.
#pragma once

#include "block/storage.cuh"

namespace torch_mbv2::block {

// The part of the source that lies inside the map.
template <typename Instance>
struct SourceTile {
  BlockPlace place;
  int halo_h, halo_w;  // of the expanded map
  int width, height;   // of the source in shared memory
  int pixels, tiles;   // of all images; tiles of 16 pixels

  __device__ __forceinline__ explicit SourceTile(const BlockArgs& a)
      : place(find_place<Instance>(a)) {
    halo_h = plan::halo_size(a.tile_h, Instance::kStride, Instance::kWindow);
    halo_w = plan::halo_size(a.tile_w, Instance::kStride, Instance::kWindow);
    width = row_of_source<Instance>(place.x1 - place.x0);
    height = place.y1 - place.y0;
    pixels = place.images * height * width;
    tiles = ceil_div(pixels, 16 * Instance::kPixelTiles) * Instance::kPixelTiles;
  }
};

// ---------------------------------------------------------------------------- Images

// A row of an image in shared memory is one of pixels of three channels. Unless rows are copied as
// they are, the pixel before the first one that windows read lies kImageLead bytes from its start.
constexpr int kImageLead = 8;

// Of an image: the first row and column that windows read, and where in a row of shared memory the
// even column there or before it lies (where rows are copied as they are, which keeps the alignment
// of device memory), or the one before it.
template <typename Instance>
struct ImagePlace {
  static constexpr int kPixelBytes = plan::kImageChannels * Instance::kBytes;
  int y, x, lead;
  bool as_rows;

  __device__ __forceinline__ ImagePlace(const BlockArgs& a, const BlockPlace& place) {
    y = plan::kStemStride * place.top - a.stem_top;
    x = plan::kStemStride * place.left - a.stem_left;
    as_rows = a.image_load == ImageLoad::kRows;
    lead = as_rows ? first_byte() & (kUnitBytes - 1) : kImageLead;
  }
  // In a row of device memory, of the even column at or before x.
  __device__ __forceinline__ int first_byte() const { return (x & ~1) * kPixelBytes; }
  // In a row of shared memory: an even number of elements, one more than a window has, starts with
  // the window where its column is even, else one element before it.
  __device__ __forceinline__ int first_window() const {
    return lead + (as_rows && x % 2 == 0 ? 0 : 2 * Instance::kBytes);
  }
};

// Rounds and stores two pixels.
template <typename Instance, typename Pixel>
__device__ __forceinline__ void store_pixels(const Pixel (&values)[plan::kImageChannels][2],
                                             uint32_t at, bool aligned) {
  using T = typename Instance::T;
  constexpr int kBytes = Instance::kBytes;
  T elements[2 * plan::kImageChannels];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int k = 0; k < plan::kImageChannels; ++k) {
      if constexpr (std::is_same_v<Pixel, T>) {
        elements[3 * v + k] = values[k][v];
      } else {
        elements[3 * v + k] = from_float<T>(to_float(values[k][v]));
      }
    }
  }
  if (aligned) {  // to 4 bytes
#pragma unroll
    for (int i = 0; i < 6; i += 2) {
      store_shared4(at + i * kBytes, pack_pair(elements[i], elements[i + 1]));
    }
  } else {
    store_shared2(at, elements[0]);
    store_shared4(at + 1 * kBytes, pack_pair(elements[1], elements[2]));
    store_shared4(at + 3 * kBytes, pack_pair(elements[3], elements[4]));
    store_shared2(at + 5 * kBytes, elements[5]);
  }
}

// Copies `rows` rows of an image, from row0 on, to shared memory at `to`, with zeros outside the
// image. Of a row, pixel column0 - 1 + i goes to kImageLead bytes and i pixels: windows read the
// element before their first pixel.
template <typename Instance, typename Pixel, bool kPairs>
__device__ void load_image_pixels(const BlockArgs& a, const Pixel* image, uint32_t to, int row0,
                                  int column0, int rows) {
  constexpr int kPixelBytes = ImagePlace<Instance>::kPixelBytes;
  const uint64_t channels[3] = {opaque_address(image), opaque_address(image + a.stride_c),
                                opaque_address(image + int64_t(2) * a.stride_c)};
  const int threads = blockDim.x, count = rows * int(a.image_pairs.divisor);
  const int first = column0 % 2 == 0 ? -2 : -1;  // pairs of pixels start at even columns
  constexpr int kAtOnce = 4;                     // whose loads fly together
  for (int start = threadIdx.x; start < count; start += kAtOnce * threads) {
    Pixel value[kAtOnce][3][2];
    uint32_t at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      uint32_t pair;
      const int r = a.image_pairs.divide(min(start + u * threads, count - 1), pair);
      const int p = first + 2 * int(pair);
      const int y = row0 + r, x = column0 + p;
      const int from = y * a.stride_h + x * a.stride_w;
      at[u] = to + r * a.storage.image_row + kImageLead + (p + 1) * kPixelBytes;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const bool real = unsigned(y) < unsigned(a.height) && k < a.in_channels;
        if constexpr (kPairs) {
          load_elements(value[u][k], channels[k], from, real && unsigned(x) < unsigned(a.width));
        } else {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            Pixel one[1];
            load_elements(one, channels[k], from + v * a.stride_w,
                          real && unsigned(x + v) < unsigned(a.width));
            value[u][k][v] = one[0];
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      store_pixels<Instance>(value[u], at[u], first == -1);
    }
  }
}

// Copies rows of the image whose element strides are those of shared memory: 16 threads a row, 16
// bytes each at a time.
template <typename Instance>
__device__ __forceinline__ void load_image_rows(const BlockArgs& a,
                                                const ImagePlace<Instance>& place,
                                                const typename Instance::T* image, uint32_t to,
                                                int rows) {
  constexpr int kPixelBytes = ImagePlace<Instance>::kPixelBytes, kRowThreads = 16;
  const int row_step = blockDim.x / kRowThreads;
  for (int at = threadIdx.x % kRowThreads * kUnitBytes; at < a.storage.image_row;
       at += kRowThreads * kUnitBytes) {
    const int column = place.first_byte() - place.lead + at;  // in bytes
    const int real = column < 0 ? 0 : max(min(a.width * kPixelBytes - column, kUnitBytes), 0);
    int r = threadIdx.x / kRowThreads;
    uint32_t row = to + r * a.storage.image_row + at;
    const auto* p = image + (place.y + r) * int64_t(a.stride_h) + column / Instance::kBytes;
    for (; r < rows; r += row_step) {
      if (real > 0 && unsigned(place.y + r) < unsigned(a.height)) {
        copy_async_part(row, p, real);
      } else {
        store_shared16(row, {0, 0, 0, 0});
      }
      row += row_step * a.storage.image_row;
      p += row_step * a.stride_h;
    }
  }
}

// The source from an image.
template <typename Instance>
__device__ __forceinline__ void load_image(const BlockArgs& a, const SharedMemory& memory,
                                           const SourceTile<Instance>& tile) {
  using T = typename Instance::T;
  const ImagePlace<Instance> place(a, tile.place);
  const int rows = plan::image_rows(tile.halo_h);
  for (int image = 0; image < tile.place.images; ++image) {
    const int64_t from = (tile.place.image0 + image) * a.image_step;
    const uint32_t to = memory.source + image * rows * a.storage.image_row;
    const auto load = [&](auto zero) {
      using Pixel = decltype(zero);
      const Pixel* const first = static_cast<const Pixel*>(a.input) + from;
      if (a.image_load == ImageLoad::kPairs) {
        load_image_pixels<Instance, Pixel, true>(a, first, to, place.y, place.x, rows);
      } else {
        load_image_pixels<Instance, Pixel, false>(a, first, to, place.y, place.x, rows);
      }
    };
    if (place.as_rows) {
      load_image_rows<Instance>(a, place, static_cast<const T*>(a.input) + from, to, rows);
    } else if (a.image_dtype == DType::kFloat32) {
      load(float{});
    } else if (a.image_dtype == DType::kFloat16) {
      load(__half{});
    } else {
      load(__nv_bfloat16{});
    }
  }
}

// ---------------------------------------------------------------------------- Maps

using plan::kFewUnits;

template <typename Instance>
__device__ __forceinline__ bool has_few_units(const BlockArgs& a) {
  return !Instance::kImage && a.storage.source_units > 0 && a.storage.source_units <= kFewUnits;
}

// Copies a pixel of few units from device memory to shared memory.
template <typename T>
__device__ __forceinline__ void load_pixel(const BlockArgs& a, const T* from, uint32_t to) {
  const uint64_t pixel = opaque_address(from);
#pragma unroll
  for (int u = 0; u < kFewUnits; ++u) {
    if (u >= a.storage.source_units) continue;
    const bool real = u * kUnitChannels < a.in_channels;
    copy_async16_cached(to + u * kUnitBytes, pixel + (real ? u * kUnitBytes : 0), real);
  }
}

// The source from a map whose pixels have many units: a warp a line, whose units lie one after the
// other in device memory.
template <typename Instance>
__device__ __forceinline__ void load_lines(const BlockArgs& a, const SharedMemory& memory,
                                           const SourceTile<Instance>& tile) {
  using T = typename Instance::T;
  const BlockPlace& place = tile.place;
  const int source_pixel = memory.source_pixel;
  for (int image = 0; image < place.images; ++image) {
    for (int line = threadIdx.x / 32; line < tile.height; line += blockDim.x / 32) {
      const T* const from = static_cast<const T*>(a.input) + (place.image0 + image) * a.image_step +
                            ((place.y0 + line) * a.width + place.x0) * a.in_channels;
      const uint32_t to = memory.source + (image * tile.height + line) * tile.width * source_pixel;
#pragma unroll 4
      for (int i = threadIdx.x % 32; i < (place.x1 - place.x0) * a.storage.source_units; i += 32) {
        uint32_t unit;
        const uint32_t x = a.units.divide(i, unit);
        const bool real = unit * kUnitChannels < a.in_channels;
        copy_async16(to + x * source_pixel + unit * kUnitBytes,
                     from + x * a.in_channels + (real ? unit * kUnitChannels : 0), real);
      }
    }
  }
}

// ---------------------------------------------------------------------------- Both

// Zeros where the expanded map is outside the map, which every chunk leaves alone; elsewhere notes
// where the source's pixel goes, and for an image where its window is. Copies source pixels of few
// units on the way.
template <typename Instance>
__device__ __forceinline__ void place_pixels(const BlockArgs& a, const SharedMemory& memory,
                                             const SourceTile<Instance>& tile) {
  using T = typename Instance::T;
  const BlockPlace& place = tile.place;
  const ImagePlace<Instance> image_place(a, place);
  const bool few_units = has_few_units<Instance>(a);
  for (int p = threadIdx.x; p < a.images * tile.halo_h * tile.halo_w; p += blockDim.x) {
    uint32_t x, line_y;
    const uint32_t line = a.halo_width.divide(p, x);
    const int image = a.halo_height.divide(line, line_y);
    const int at = Instance::kSplit ? (x & 1) * a.storage.odd_pixels + (x >> 1) : x;
    const uint32_t pixel = memory.expanded + (line * a.storage.row_pixels + at) * Instance::kPitch;
    const int y = place.top + int(line_y), column = place.left + int(x);
    if (image >= place.images || y < place.y0 || y >= place.y1 || column < place.x0 ||
        column >= place.x1) {
#pragma unroll
      for (int u = 0; u < Instance::kPitch; u += kUnitBytes)
        store_shared16(pixel + u, {0, 0, 0, 0});
      continue;
    }
    const int m = (image * tile.height + y - place.y0) * tile.width + column - place.x0;
    store_shared4(memory.places + m * kAddressBytes, pixel);
    if constexpr (Instance::kImage) {
      const uint32_t row = image * plan::image_rows(tile.halo_h) + plan::kStemStride * line_y;
      store_shared4(memory.windows + m * kAddressBytes,
                    memory.source + row * a.storage.image_row + image_place.first_window() +
                        x * plan::kStemStride * ImagePlace<Instance>::kPixelBytes);
    } else if (few_units) {
      load_pixel<T>(a,
                    static_cast<const T*>(a.input) + (place.image0 + image) * a.image_step +
                        (y * a.width + column) * a.in_channels,
                    memory.source + m * memory.source_pixel);
    }
  }
}

// Pixels of the source that are none, which fill up the last tile and, where columns are split,
// rows of an odd number: they go nowhere.
template <typename Instance>
__device__ __forceinline__ void skip_pixels(const SharedMemory& memory,
                                            const SourceTile<Instance>& tile) {
  const auto skip = [&](int m) {
    store_shared4(memory.places + m * kAddressBytes, 0);
    if constexpr (Instance::kImage)
      store_shared4(memory.windows + m * kAddressBytes, memory.source);
  };
  for (int m = tile.pixels + threadIdx.x; m < tile.tiles * 16; m += blockDim.x) skip(m);
  const int real = tile.place.x1 - tile.place.x0;
  if (tile.width > real) {
    for (int line = threadIdx.x; line < tile.place.images * tile.height; line += blockDim.x) {
      skip(line * tile.width + real);
    }
  }
}

// What place_pixels has not copied of the source.
template <typename Instance>
__device__ __forceinline__ void load_source(const BlockArgs& a, const SharedMemory& memory,
                                            const SourceTile<Instance>& tile) {
  if constexpr (Instance::kImage) {
    load_image<Instance>(a, memory, tile);
  } else if (a.storage.source_units > kFewUnits) {
    load_lines<Instance>(a, memory, tile);
  }
}

}  // namespace torch_mbv2::block

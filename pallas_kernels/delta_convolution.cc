// Delta inference of a convolutional network on a CPU: one frame through `deltajax.delta_activations.graph`, pixel by pixel.
//
// Every map [H + margins, W + margins, C] stays in memory; the margins are zeros, so no window has a border. A map computes
// the pixels of which a window holds a changed pixel, from whole inputs, writes them over the old ones and notes which of
// them differ (or, where that is known to stop nothing, all of them). Such pixels are collected into strips, wherever they lie:
// a strip's sums (12 pixels of 2 vectors of channels) stand in registers while the window passes by. A pixel's sum is taken in
// one order (rows of the window, then columns and channels), in whatever strip it stands: so a frame that is computed pixel by
// pixel equals one computed densely, bit for bit.
//
// The network comes as numbers (`Program` below), its parameters as one array, packed by `delta_convolution.py`.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <exception>
#include <string>
#include <vector>

#include "team.h"

namespace {

namespace ffi = xla::ffi;
using deltajax::kLanes;
using deltajax::load;
using deltajax::store;
using deltajax::Team;

using Floats = deltajax::Vector<float>;
using Words = deltajax::Vector<uint32_t>;
constexpr int64_t kWidth = kLanes<float>;
constexpr int kPixels = deltajax::kVectorBytes == 64 ? 12 : 5;  // of a strip: with 2 vectors each, what registers hold
constexpr int64_t kChunk = 256;                                 // pixels of a task, at most
constexpr int32_t kRest = 3;                                    // frames between comparisons that stop nothing

enum Kind : int64_t { kInput, kConvolution, kMaxPool, kAdd, kConcat };
enum Activation : int64_t { kNone, kRelu, kHardSwish, kHardSigmoid, kRelu6 };

struct Source {
  int64_t node, size, stride, before;
  const float* weights;  // null: read as it is
};

struct Node {
  int64_t kind, height, width, channels, margin, row;  // row: pixels of the map's memory from one row to the next
  int64_t activation, groups, step_apart;              // step_apart: from one pixel's steps to the next one's; 0: one for all
  const float *bias, *step;                            // null: none
  std::vector<Source> sources;

  float* map = nullptr;
  uint8_t* changed = nullptr;       // [height, width]: pixels that differ from the frame before
  uint8_t* changed_rows = nullptr;  // [height]: rows that have one
  bool any = false;                 // whether one may be there

  // Where a pixel begins, counted in numbers.
  int64_t at(int64_t y, int64_t x) const { return ((y + margin) * row + x + margin) * channels; }

  // Numbers of the map's memory.
  int64_t numbers() const { return (row - width + height) * row * channels; }

  // Marks a pixel if it differs. Threads may mark the same one: each computes some of its channels. Nobody can foresee which
  // pixels differ, so there is no branch: of those that do not, the byte in front of the array is marked.
  void mark(int64_t y, int64_t x, bool differs) const {
    const int64_t chosen = -static_cast<int64_t>(differs);
    __atomic_store_n(changed - 1 + ((y * width + x + 1) & chosen), uint8_t{1}, __ATOMIC_RELAXED);
    __atomic_store_n(changed_rows - 1 + ((y + 1) & chosen), uint8_t{1}, __ATOMIC_RELAXED);
  }
};

// A pixel's place in a map of at most 2^15 rows and columns.
int32_t position(int64_t y, int64_t x) { return static_cast<int32_t>(y << 16 | x); }
int64_t row_of(int32_t position) { return position >> 16; }
int64_t column_of(int32_t position) { return position & 0xffff; }

// Nodes as numbers: kind, height, width, channels, margins before and after, activation, groups, offset of the bias, of the
// step, step_apart, number of sources; and of each source: node, size, stride, padding before, offset of the weights.
// Offsets count 16 parameters; -1: there are none.
std::vector<Node> parse(const int32_t* program, int64_t length, const float* parameters) {
  std::vector<Node> nodes;
  const int32_t *next = program, *end = program + length;
  auto array = [&] {
    const int64_t offset = *next++;
    return offset < 0 ? nullptr : parameters + 16 * offset;
  };
  while (next < end) {
    Node node{};
    for (int64_t* field : {&node.kind, &node.height, &node.width, &node.channels, &node.margin}) *field = *next++;
    node.row = node.margin + node.width + *next++;
    node.activation = *next++;
    node.groups = *next++;
    node.bias = array();
    node.step = array();
    node.step_apart = *next++;
    node.sources.resize(*next++);
    for (Source& source : node.sources) {
      for (int64_t* field : {&source.node, &source.size, &source.stride, &source.before}) *field = *next++;
      source.weights = array();
    }
    nodes.push_back(std::move(node));
  }
  return nodes;
}

template <typename To, typename From>
To bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// To integers, halves to even; numbers of 2^23 and more are integers.
Floats round(const Floats& x) {
  const Words sign = bits<Words>(x) & 0x80000000u;
  const Floats size = bits<Floats>(bits<Words>(x) ^ sign);
  const Floats rounded = size + 8388608.f - 8388608.f;
  return bits<Floats>(bits<Words>(size < 8388608.f ? rounded : size) | sign);
}

// Comparisons with what is no number are false, so that it goes on, as in JAX.
Floats activate(int64_t activation, const Floats& x) {
  const Floats zero{};
  if (activation == kNone) return x;
  if (activation == kRelu) return x < zero ? zero : x;
  const Floats six = zero + 6.f, moved = activation == kRelu6 ? x : x + 3.f, positive = moved < zero ? zero : moved;
  const Floats gate = positive > six ? six : positive;  // of relu6: all
  if (activation == kRelu6) return gate;
  return activation == kHardSwish ? x * gate / 6.f : gate / 6.f;
}

bool any(const Words& x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bits<__m512i>(x), bits<__m512i>(x)) != 0;
#endif
  uint64_t parts[sizeof(x) / 8], all = 0;
  std::memcpy(parts, &x, sizeof(x));
  for (uint64_t part : parts) all |= part;
  return all != 0;
}

// What a map does last, and its old numbers: numbers [c, c + n) of one pixel, which begins at `to`.
struct Ending {
  const Node& node;
  bool compare, mark_all;  // mark_all: every pixel counts as changed, uncompared

  // Of a pixel.
  const float* steps(int32_t place) const {
    return node.step_apart ? node.step + (row_of(place) * node.width + column_of(place)) * node.step_apart : node.step;
  }

  // In which bits the new numbers differ from the old ones.
  Words write(float* to, int64_t c, int64_t n, const float* steps, Floats y) const {
    y = activate(node.activation, y);
    if (steps) {
      const Floats q = load(steps + c, n);
      y = round(y / q) * q;
    }
    y += 0.f;  // no negative zeros
    to += c;
    if (n >= kWidth) {
      const Words differ = compare ? bits<Words>(load(to)) ^ bits<Words>(y) : Words{};
      store(to, y);
      return differ;
    }
    const Floats old = load(to, n);
    store(to, y, n);
    return compare ? bits<Words>(old) ^ bits<Words>(load(to, n)) : Words{};
  }

  void mark(int32_t place, const Words& differ) const {
    node.mark(row_of(place), column_of(place), mark_all || any(differ));
  }
};

// Pixels of a task: their places, and where the windows of a convolution's one or two sources and they themselves begin.
struct Pixels {
  const int32_t* places;
  int64_t count, first[kChunk], second[kChunk], own[kChunk];
};

// A window's part of one group of channels: rows `pitch` apart, of `segments` that are `apart`, of `length` numbers.
struct Reach {
  const float* map;
  int64_t rows, pitch, segments, apart, length;
};

template <int P, int V>
inline __attribute__((always_inline)) void accumulate(const Reach& reach, const int64_t* begin, const float* weights,
                                                      Floats (&sums)[P][V]) {
  for (int64_t row = 0; row < reach.rows; ++row)
    for (int64_t segment = 0; segment < reach.segments; ++segment) {
      const float* at[P];
      const float* map = reach.map + row * reach.pitch + segment * reach.apart;
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) at[p] = map + begin[p];
      for (int64_t j = 0; j < reach.length; ++j) {
        Floats w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[v] = load(weights + v * kWidth);
        weights += V * kWidth;
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[p][v] += at[p][j] * w[v];
      }
    }
}

// One block of a convolution's output channels.
struct Block {
  Ending ending;
  Reach first, second;                          // second.map null: no second source
  const float *weights, *shortcut, *bias;       // shortcut null: the second source is added as it is
  int64_t channel, count;                       // of the map
};

template <int P, int V>
void strip(const Block& block, const Pixels& pixels, int64_t from) {
  // The old numbers, or the memory to be written, have time to come meanwhile.
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      __builtin_prefetch(block.ending.node.map + pixels.own[from + p] + block.channel + v * kWidth, 1);
  Floats sums[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[p][v] = load(block.bias + v * kWidth);
  accumulate<P, V>(block.first, pixels.first + from, block.weights, sums);
  if (block.shortcut) accumulate<P, V>(block.second, pixels.second + from, block.shortcut, sums);
  const bool add = block.second.map && !block.shortcut;
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    const int32_t place = pixels.places[from + p];
    const float* steps = block.ending.steps(place);
    float* to = block.ending.node.map + pixels.own[from + p];
    Words differ{};
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t c = v * kWidth, n = block.count - c;
      if (add) sums[p][v] += load(block.second.map + pixels.second[from + p] + block.channel + c, n);
      differ |= block.ending.write(to, block.channel + c, n, steps, sums[p][v]);
    }
    block.ending.mark(place, differ);
  }
}

using Strip = void (*)(const Block&, const Pixels&, int64_t);

template <int V, std::size_t... P>
Strip strip_of(int64_t pixels, std::index_sequence<P...>) {
  static constexpr Strip strips[] = {&strip<P + 1, V>...};
  return strips[pixels - 1];
}

// f(first pixel, number) of strips of about the same length.
template <typename F>
void over_strips(int64_t pixels, const F& f) {
  const int64_t strips = (pixels + kPixels - 1) / kPixels;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t from = pixels * i / strips;
    f(from, pixels * (i + 1) / strips - from);
  }
}

int64_t vectors(int64_t channels) { return (channels + kWidth - 1) / kWidth; }
int64_t blocks(const Node& node) { return node.groups * ((vectors(node.channels / node.groups) + 1) / 2); }

void convolve(const std::vector<Node>& nodes, const Ending& ending, const Pixels& pixels, int64_t from, int64_t to) {
  const Node& node = ending.node;
  const int64_t channels = node.channels / node.groups, each = blocks(node) / node.groups;
  const Source& source = node.sources[0];
  const Node& read = nodes[source.node];
  const int64_t inputs = read.channels / node.groups, taps = source.size * source.size * inputs;
  Block block{ending, {}, {}, nullptr, nullptr, nullptr, 0, 0};
  if (node.groups == 1)
    block.first = {read.map, source.size, read.row * read.channels, 1, 0, source.size * inputs};
  else
    block.first = {read.map, source.size, read.row * read.channels, source.size, read.channels, inputs};
  int64_t others = 0;
  if (node.sources.size() > 1) {
    const Node& other = nodes[node.sources[1].node];
    others = other.channels;
    block.second = {other.map, 1, 0, 1, 0, other.channels};
  }
  for (int64_t b = from; b < to; ++b) {
    const int64_t group = b / each, part = b % each, lane = part * 2 * kWidth, padded = vectors(channels) * kWidth;
    const bool two = padded - lane > kWidth;
    block.first.map = read.map + group * inputs;
    block.channel = group * channels + lane;
    block.count = channels - lane;
    block.bias = node.bias + group * padded + lane;
    block.weights = source.weights + (group * padded + lane) * taps;
    if (others && node.sources[1].weights) block.shortcut = node.sources[1].weights + lane * others;
    over_strips(pixels.count, [&](int64_t first, int64_t count) {
      constexpr auto sizes = std::make_index_sequence<kPixels>();
      (two ? strip_of<2>(count, sizes) : strip_of<1>(count, sizes))(block, pixels, first);
    });
  }
}

// A convolution in which every channel is a group: vectors of channels meet vectors of weights.
template <int P>
void depthwise(const Block& block, const Pixels& pixels, int64_t from) {
  const Reach& reach = block.first;
  const int64_t channels = block.ending.node.channels, padded = vectors(channels) * kWidth;
  Words differ[P] = {};
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t n = channels - c;
    Floats sums[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(block.ending.node.map + pixels.own[from + p] + c, 1);
      sums[p] = load(block.bias + c);
    }
    const float* weights = block.weights + c;
    for (int64_t row = 0; row < reach.rows; ++row) {
      const float* at[P];
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) at[p] = reach.map + row * reach.pitch + c + pixels.first[from + p];
      for (int64_t column = 0; column < reach.segments; ++column) {
        const Floats w = load(weights);
        weights += padded;
        const int64_t offset = column * reach.apart;
        if (n >= kWidth) {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) sums[p] += load(at[p] + offset) * w;
        } else {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) sums[p] += load(at[p] + offset, n) * w;
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      if (block.second.map) sums[p] += load(block.second.map + pixels.second[from + p] + c, n);
      float* to = block.ending.node.map + pixels.own[from + p];
      differ[p] |= block.ending.write(to, c, n, block.ending.steps(pixels.places[from + p]), sums[p]);
    }
  }
  for (int p = 0; p < P; ++p) block.ending.mark(pixels.places[from + p], differ[p]);
}

template <std::size_t... P>
Strip depthwise_of(int64_t pixels, std::index_sequence<P...>) {
  static constexpr Strip strips[] = {&depthwise<P + 1>...};
  return strips[pixels - 1];
}

bool is_depthwise(const std::vector<Node>& nodes, const Node& node) {
  return node.kind == kConvolution && node.groups > 1 && node.groups == node.channels &&
         node.channels == nodes[node.sources[0].node].channels;
}

void convolve_depthwise(const std::vector<Node>& nodes, const Ending& ending, const Pixels& pixels) {
  const Source& source = ending.node.sources[0];
  const Node& read = nodes[source.node];
  Block block{ending, {read.map, source.size, read.row * read.channels, source.size, read.channels, 1}, {}, source.weights,
              nullptr, ending.node.bias, 0, 0};
  if (ending.node.sources.size() > 1) block.second.map = nodes[ending.node.sources[1].node].map;
  over_strips(pixels.count, [&](int64_t first, int64_t count) {
    depthwise_of(count, std::make_index_sequence<kPixels>())(block, pixels, first);
  });
}

// Pooling, sums and concatenations: one pixel.
void combine(const std::vector<Node>& nodes, const Ending& ending, int32_t place) {
  const Node& node = ending.node;
  const int64_t y = row_of(place), x = column_of(place);
  const float* steps = ending.steps(place);
  float* to = node.map + node.at(y, x);
  Words differ{};
  auto begin = [&](const Source& source) {
    const Node& read = nodes[source.node];
    return read.map + read.at(y * source.stride - source.before, x * source.stride - source.before);
  };
  if (node.kind == kConcat) {
    int64_t c = 0;
    for (const Source& source : node.sources) {
      const int64_t channels = nodes[source.node].channels;
      const float* from = begin(source);
      for (int64_t i = 0; i < channels; i += kWidth)
        differ |= ending.write(to, c + i, std::min(kWidth, channels - i), steps, load(from + i, channels - i));
      c += channels;
    }
  } else {
    for (int64_t c = 0; c < node.channels; c += kWidth) {
      const int64_t n = node.channels - c;
      Floats value = load(begin(node.sources[0]) + c, n);
      if (node.kind == kAdd) {
        for (std::size_t i = 1; i < node.sources.size(); ++i) value += load(begin(node.sources[i]) + c, n);
      } else {
        const Source& source = node.sources[0];
        const Node& read = nodes[source.node];
        const float* from = begin(source) + c;
        for (int64_t i = 0; i < source.size; ++i)
          for (int64_t j = 0; j < source.size; ++j) {
            const Floats other = load(from + (i * read.row + j) * read.channels, n);
            value = (other > value) | (other != other) ? other : value;  // what is no number stays
          }
      }
      differ |= ending.write(to, c, n, steps, value);
    }
  }
  ending.mark(place, differ);
}

// Row y of the input; `differ`: scratch, as many numbers as the row has. Returns how many pixels changed.
int64_t read_frame(const Node& node, const float* frame, bool compare, int64_t y, uint32_t* differ) {
  const int64_t width = node.width, channels = node.channels, numbers = width * channels;
  const float *from = frame + y * numbers, *steps = node.step + y * node.step_apart;  // an input's steps are those of a row
  float* to = node.map + node.at(y, 0);
  const Ending ending{node, compare, false};
  Words all{};
  for (int64_t i = 0; i < numbers; i += kWidth) {
    const Words here = ending.write(to, i, numbers - i, node.step ? steps : nullptr, load(from + i, numbers - i));
    all |= here;
    std::memcpy(differ + i, &here, std::min(kWidth, numbers - i) * sizeof(uint32_t));
  }
  uint8_t* changed = node.changed + y * width;
  node.changed_rows[y] = compare && any(all);
  if (!node.changed_rows[y]) {
    std::memset(changed, 0, width);
    return 0;
  }
  int64_t count = 0;
  auto fill = [&](auto each) {
    for (int64_t x = 0; x < width; ++x) {
      uint32_t one = 0;
      for (int64_t c = 0; c < each; ++c) one |= differ[x * each + c];
      changed[x] = one != 0;
      count += one != 0;
    }
  };
  channels == 3 ? fill(std::integral_constant<int64_t, 3>()) : fill(channels);
  return count;
}

// to[x] |= from[x * stride]
void merge(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t count, int64_t stride) {
  if (stride == 1)
    for (int64_t x = 0; x < count; ++x) to[x] |= from[x];
  else if (stride == 2)
    for (int64_t x = 0; x < count; ++x) to[x] |= from[2 * x];
  else
    for (int64_t x = 0; x < count; ++x) to[x] |= from[stride * x];
}

// Pixels of row y that read a changed pixel are set in `dirty` [width]; false: there are none, and nothing is written.
// `seen`: scratch, as long as a source's row with margins.
bool find_readers(const std::vector<Node>& nodes, const Node& node, int64_t y, uint8_t* dirty, uint8_t* seen) {
  bool found = false;
  for (const Source& source : node.sources) {
    const Node& read = nodes[source.node];
    const int64_t top = y * source.stride - source.before, stop = std::min(top + source.size, read.height);
    bool here = false;
    for (int64_t row = std::max<int64_t>(top, 0); read.any && row < stop; ++row) {
      if (!read.changed_rows[row]) continue;
      if (!here) std::memset(seen, 0, std::max((node.width - 1) * source.stride + source.size, source.before + read.width));
      here = true;
      merge(seen + source.before, read.changed + row * read.width, read.width, 1);
    }
    if (!here) continue;
    if (!found) std::memset(dirty, 0, node.width);
    found = true;
    for (int64_t k = 0; k < source.size; ++k) merge(dirty, seen + k, node.width, source.stride);
  }
  return found;
}

// Places of the pixels of row y that are set, in order; their number.
int64_t collect(const uint8_t* set, int64_t y, int64_t width, int32_t* places) {
  int64_t count = 0, x = 0;
  for (; x + 8 <= width; x += 8) {
    uint64_t eight;
    std::memcpy(&eight, set + x, 8);
    if (!eight) continue;
    for (int64_t i = x; i < x + 8; ++i) {
      places[count] = position(y, i);
      count += set[i];
    }
  }
  for (; x < width; ++x) {
    places[count] = position(y, x);
    count += set[x];
  }
  return count;
}

struct Task {
  const int32_t* pixels;  // their places
  int64_t count, from, to;  // blocks
};

// Rows whose pixels one thread lists.
int64_t rows_of_band(const Node& node) { return std::max<int64_t>(1, 1024 / node.width); }
int64_t bands_of(const Node& node) { return (node.height - 1) / rows_of_band(node) + 1; }

// How the memory that a frame is worked in is divided. No loop takes any other, so that none can fail midway.
struct Layout {
  int64_t rests = 0, list = 0, counts = 0, tasks = 0, bands = 0, band_bytes = 0, masks = 0, size = 0;  // where each begins

  explicit Layout(const std::vector<Node>& nodes) {
    int64_t pixels = 0, most_bands = 0, most_tasks = 0, bytes = 0, mask_bytes = 0;
    for (const Node& node : nodes) {
      const int64_t own = node.height * node.width, strips = own / kPixels + bands_of(node);
      pixels = std::max(pixels, own);
      most_bands = std::max(most_bands, bands_of(node));
      most_tasks = std::max(most_tasks, strips * (node.kind == kConvolution ? blocks(node) : 1));
      // Of a band: marks of one row and of a source's row with its margins; of an input: in which bits a row's numbers differ.
      bytes = std::max(bytes, 2 * rounded(node.row));
      if (node.kind == kInput) bytes = std::max(bytes, rounded(4 * node.width * node.channels));
      mask_bytes += node.height * (node.width + 1) + 2;
    }
    band_bytes = bytes;
    list = rounded(nodes.size() * sizeof(int32_t));
    counts = list + rounded(pixels * sizeof(int32_t));
    tasks = counts + rounded(most_bands * sizeof(int64_t));
    bands = tasks + rounded(most_tasks * sizeof(Task));
    masks = bands + most_bands * band_bytes;
    size = masks + rounded(mask_bytes);
  }

  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

class Network {
 public:
  Network(std::vector<Node> nodes, const Layout& layout, uint8_t* memory, Team& team)
      : nodes_(std::move(nodes)),
        team_(team),
        rests_(reinterpret_cast<int32_t*>(memory + layout.rests)),
        list_(reinterpret_cast<int32_t*>(memory + layout.list)),
        counts_(reinterpret_cast<int64_t*>(memory + layout.counts)),
        tasks_(reinterpret_cast<Task*>(memory + layout.tasks)),
        scratch_(memory + layout.bands),
        band_bytes_(layout.band_bytes) {
    uint8_t* mask = memory + layout.masks;
    for (Node& node : nodes_) {
      node.changed = mask + 1;
      node.changed_rows = node.changed + node.height * node.width + 1;
      mask = node.changed_rows + node.height;
    }
  }

  // All maps; numbers of computed pixels (of the input: changed ones), or -1 where nothing was compared.
  void run(const float* frame, bool started, int32_t* counts) {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      Node& node = nodes_[i];
      const int64_t count = node.kind == kInput ? input(node, frame, started) : compute(node, started, rests_[i]);
      counts[i] = started ? static_cast<int32_t>(count) : -1;
    }
  }

  // Means over the pixels of the last map.
  void means(float* to) const {
    const Node& node = nodes_.back();
    for (int64_t c = 0; c < node.channels; c += kWidth) {
      Floats total{};
      for (int64_t y = 0; y < node.height; ++y) {
        Floats row{};
        for (int64_t x = 0; x < node.width; ++x) row += load(node.map + node.at(y, x) + c, node.channels - c);
        total += row;
      }
      store(to + c, total / static_cast<float>(node.height * node.width), node.channels - c);
    }
  }

 private:
  int64_t input(Node& node, const float* frame, bool started) {
    const int64_t band = rows_of_band(node), bands = bands_of(node);
    team_.run(bands, [&](int64_t i) {
      counts_[i] = 0;
      for (int64_t y = i * band; y < std::min((i + 1) * band, node.height); ++y)
        counts_[i] += read_frame(node, frame, started, y, reinterpret_cast<uint32_t*>(scratch_ + i * band_bytes_));
    });
    int64_t count = 0;
    for (int64_t i = 0; i < bands; ++i) count += counts_[i];
    node.any = count > 0;
    return count;
  }

  int64_t compute(Node& node, bool started, int32_t& rest) {
    node.any = false;
    if (!started) rest = 0;
    if (started && std::none_of(node.sources.begin(), node.sources.end(),
                                [&](const Source& source) { return nodes_[source.node].any; }))
      return 0;
    const int64_t band = rows_of_band(node), bands = bands_of(node);
    team_.run(bands, [&](int64_t i) {
      const int64_t from = i * band, to = std::min(from + band, node.height);
      int32_t* list = list_ + from * node.width;
      uint8_t *dirty = scratch_ + i * band_bytes_, *seen = dirty + band_bytes_ / 2;
      int64_t count = 0;
      for (int64_t y = from; y < to; ++y) {
        if (started) {
          if (find_readers(nodes_, node, y, dirty, seen)) count += collect(dirty, y, node.width, list + count);
        } else {
          for (int64_t x = 0; x < node.width; ++x) list[count++] = position(y, x);
        }
      }
      std::memset(node.changed + from * node.width, 0, (to - from) * node.width);
      std::memset(node.changed_rows + from, 0, to - from);
      counts_[i] = count;
    });
    int64_t total = 0;
    for (int64_t i = 0; i < bands; ++i) total += counts_[i];
    if (!total) return 0;
    const int64_t tasks = plan(node, total, bands, band);
    // Where most is computed and nearly all of it differs, comparing costs more than it saves: what is computed counts as
    // changed, which is always right, and only every so often it is looked whether it still is so.
    const bool much = started && 4 * total > node.height * node.width, resting = much && rest > 0;
    const Ending ending{node, started && !resting, resting};
    const bool dense = node.kind == kConvolution, by_channel = is_depthwise(nodes_, node);
    team_.run(tasks, [&](int64_t i) {
      const Task& task = tasks_[i];
      if (!dense) {
        for (int64_t p = 0; p < task.count; ++p) combine(nodes_, ending, task.pixels[p]);
        return;
      }
      Pixels pixels;
      locate(node, task, pixels);
      if (by_channel)
        convolve_depthwise(nodes_, ending, pixels);
      else
        convolve(nodes_, ending, pixels, task.from, task.to);
    });
    node.any = started;  // some may differ
    if (resting) {
      --rest;
    } else if (much) {
      int64_t differ = 0;
      for (int64_t i = 0; i < node.height * node.width; ++i) differ += node.changed[i];
      rest = 64 * (total - differ) < total ? kRest : 0;
    }
    return total;
  }

  void locate(const Node& node, const Task& task, Pixels& pixels) const {
    pixels.places = task.pixels;
    pixels.count = task.count;
    auto begins = [&](const Node& read, int64_t stride, int64_t before, int64_t* to) {
      const int32_t* places = task.pixels;
      const int64_t count = task.count, first = read.at(-before, -before);
      const int64_t down = stride * read.row * read.channels, across = stride * read.channels;
      for (int64_t p = 0; p < count; ++p) to[p] = first + row_of(places[p]) * down + column_of(places[p]) * across;
    };
    int64_t* sources[] = {pixels.first, pixels.second};
    for (std::size_t i = 0; i < node.sources.size(); ++i)
      begins(nodes_[node.sources[i].node], node.sources[i].stride, node.sources[i].before, sources[i]);
    begins(node, 1, 0, pixels.own);
  }

  // Tasks: of many pixels, so that weights are read seldom, but enough tasks for everybody. Returns how many.
  int64_t plan(const Node& node, int64_t total, int64_t bands, int64_t band) {
    int64_t made = 0;
    const bool depthwise = is_depthwise(nodes_, node);
    const int64_t all = node.kind == kConvolution && !depthwise ? blocks(node) : 1;
    const int64_t wanted = team_.size() == 1 ? 1 : 6 * team_.size();
    int64_t taps = 1;
    if (node.kind == kConvolution) taps = node.sources[0].size * node.sources[0].size * nodes_[node.sources[0].node].channels / node.groups;
    const bool heavy = taps * node.channels * 4 > 256 * 1024;  // more weights than a second cache likes: each thread its own
    int64_t chunk = kChunk, parts = 1;
    if (heavy && all > 1) {
      parts = std::min(all, std::max<int64_t>(wanted, 1));
    } else {
      chunk = std::min<int64_t>(96, std::max<int64_t>(kPixels, (total / wanted + kPixels - 1) / kPixels * kPixels));
      const int64_t chunks = (total + chunk - 1) / chunk;
      if (chunks < 2 * team_.size() && team_.size() > 1) parts = std::min(all, wanted / chunks);
    }
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < bands; ++i) {
        const int64_t count = counts_[i], chunks = (count + chunk - 1) / chunk;
        const int32_t* list = list_ + i * band * node.width;
        for (int64_t j = 0; j < chunks; ++j)
          tasks_[made++] = {list + count * j / chunks, count * (j + 1) / chunks - count * j / chunks, all * part / parts,
                            all * (part + 1) / parts};
      }
    return made;
  }

  std::vector<Node> nodes_;
  Team& team_;
  int32_t* rests_;  // of every node: frames until it compares again; all else means nothing between frames
  int32_t* list_;
  int64_t* counts_;
  Task* tasks_;
  uint8_t* scratch_;
  int64_t band_bytes_;
};

// program: the number of threads at most, then that of `parse`.
ffi::Error run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> frame, ffi::Buffer<ffi::PRED> started,
               ffi::Buffer<ffi::S32> program, ffi::Buffer<ffi::F32> parameters, ffi::RemainingArgs,
               ffi::ResultBuffer<ffi::F32> means, ffi::ResultBuffer<ffi::S32> counts, ffi::ResultBuffer<ffi::U8> memory,
               ffi::RemainingRets maps) try {
  const int32_t* numbers = program.typed_data();
  std::vector<Node> nodes = parse(numbers + 1, program.element_count() - 1, parameters.typed_data());
  if (maps.size() != nodes.size()) return ffi::Error::InvalidArgument("as many maps as nodes are needed");
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    auto map = maps.get<ffi::Buffer<ffi::F32>>(i);
    if (!map.has_value()) return map.error();
    nodes[i].map = (*map)->typed_data();
    if (static_cast<int64_t>((*map)->element_count()) != nodes[i].numbers())
      return ffi::Error::InvalidArgument("map " + std::to_string(i) + " has another size than its node");
  }
  const Layout layout(nodes);
  if (static_cast<int64_t>(memory->element_count()) < layout.size)
    return ffi::Error::InvalidArgument(std::to_string(layout.size) + " bytes of memory are needed");
  Team team(pool, numbers[0]);
  Network network(std::move(nodes), layout, memory->typed_data(), team);
  network.run(frame.typed_data(), *started.typed_data(), counts->typed_data());
  network.means(means->typed_data());
  return ffi::Error::Success();
} catch (const std::exception& error) {  // before any map is touched: there is no memory for the nodes or the team
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("delta inference has no memory: ") + error.what());
}

}  // namespace

// Bytes of memory that frames of this network are worked in.
extern "C" int64_t deltajax_delta_convolution_memory(const int32_t* program, int64_t length) {
  return Layout(parse(program + 1, length - 1, nullptr)).size;
}

// The memory and the maps are arguments and, in the same memory, results.
XLA_FFI_DEFINE_HANDLER_SYMBOL(deltajax_delta_convolution, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .RemainingRets());

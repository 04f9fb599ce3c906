// The delta product on a CPU, token by token: the recurrence of `deltajax.ops.delta_product`, forward and backward.
//
// The columns of a state S [K, V] do not know of each other, so they are worked off in blocks of at most four vectors: the
// part of S that belongs to one (16 KB at K = V = 64 in float32) stays in the first cache, and every step passes over it once:
// with u = beta (v - S^T k) known, the pass adds k u^T, reads the sum by q, applies the decay of the token after it and
// reads it by the next key, which is all that the next u needs. Forward, a task is a block; backward, whose gradients by
// q, k, beta and the decay are sums over columns, it is a head.
//
// The backward needs S before each step, last step first. The forward keeps it before every chunk of tokens; from there
// the steps of the chunk are done again, every state of them kept, and then undone. With dS the gradient by S after a
// step (the read-out by q included) and S' the state before it, decayed:
//   du = dS^T k;   dk = dS u - S' beta du;   dv = beta du;   dbeta = du . (v - S'^T k);   dS' = dS - k (beta du)^T
// and where the step is its token's first, d log(decay) = S' . dS' and dS' is multiplied by the decay.
#include "native.h"

namespace {

namespace ffi = xla::ffi;
using deltajax::kLanes;
using deltajax::load;
using deltajax::Scratch;
using deltajax::store;
using deltajax::sum;
using deltajax::sums;
using deltajax::Vector;

// R steps per token; a decay for each token (0: none, 1: one number, K: one per key channel); tokens in a chunk.
struct Sizes {
  int64_t B = 1, T, R, H, HV, K, V, decays, chunk;

  int64_t chunks() const { return (T + chunk - 1) / chunk; }
  int64_t steps() const { return T * R; }
};

// A row of a block: N vectors, the last ones filled up with zeros.
template <typename T, int N>
struct Row {
  Vector<T> x[N] = {};

  static Row from(const T* values, int64_t columns) {
    Row row;
    for (int j = 0; j < N; ++j) row.x[j] = load<T>(values + j * kLanes<T>, columns - j * kLanes<T>);
    return row;
  }
  void to(T* values, int64_t columns) const {
    for (int j = 0; j < N; ++j) store<T>(values + j * kLanes<T>, x[j], columns - j * kLanes<T>);
  }
  Row times(T factor) const {
    Row row;
    for (int j = 0; j < N; ++j) row.x[j] = x[j] * factor;
    return row;
  }
  Row minus(const Row& other) const {
    Row row;
    for (int j = 0; j < N; ++j) row.x[j] = x[j] - other.x[j];
    return row;
  }
  T dot(const Row& other) const {
    Vector<T> total{};
    for (int j = 0; j < N; ++j) total += x[j] * other.x[j];
    return sum<T>(total);
  }
};

// The arguments of one head of one sequence.
template <typename T>
struct Head {
  const Sizes& size;
  const T *q, *k, *v, *beta, *decay;

  Head(const Sizes& s, int64_t b, int64_t h, const T* q, const T* k, const T* v, const T* beta, const T* decay)
      : size(s),
        q(q + (b * s.T * s.H + h / (s.HV / s.H)) * s.K),
        k(k + (b * s.steps() * s.H + h / (s.HV / s.H)) * s.K),
        v(v + (b * s.steps() * s.HV + h) * s.V),
        beta(beta + b * s.steps() * s.HV + h),
        decay(decay + (b * s.T * s.HV + h) * s.decays) {}

  const T* query(int64_t token) const { return q + token * size.H * size.K; }
  const T* key(int64_t step) const { return k + step * size.H * size.K; }
  const T* value(int64_t step) const { return v + step * size.HV * size.V; }
  T step_size(int64_t step) const { return beta[step * size.HV]; }
  const T* decay_of(int64_t token) const { return decay + token * size.HV * size.decays; }
};

enum class Decay { kNone, kNumber, kChannel };
enum class Read { kNothing, kOutputs, kGradients };

// `row(c, slot)` for every key channel, neighbours with slots of their own: chains of additions that do not wait for each other.
template <int Slots, typename F>
inline __attribute__((always_inline)) void over_rows(int64_t from, int64_t to, const F& row) {
  int64_t c = from;
  for (; c + Slots <= to; c += Slots)
    for (int slot = 0; slot < Slots; ++slot) row(c + slot, slot);
  for (; c < to; ++c) row(c, 0);
}

template <typename T, int N>
constexpr int kSlots = N >= 4 ? 1 : 4 / N;

// A sum over columns, to which the blocks after the first add.
template <typename T>
inline void put(T* to, const Vector<T>& x, int64_t count, bool more) {
  store<T>(to, more ? load<T>(to, count) + x : x, count);
}

template <typename T, int N>
inline Row<T, N> total(const Row<T, N> (&parts)[kSlots<T, N>]) {
  Row<T, N> all = parts[0];
  for (int slot = 1; slot < kSlots<T, N>; ++slot)
    for (int j = 0; j < N; ++j) all.x[j] += parts[slot].x[j];
  return all;
}

// One step forward: to = from + k u^T, decayed for the token after it. Returns to^T next.
// kOutputs: `read` becomes its product with the query; kGradients: dq = its product with `read`.
template <typename T, int N, Decay kDecay, Read kRead>
Row<T, N> step(int64_t K, const T* from, T* to, const T* k, const Row<T, N>& u, const T* q, Row<T, N>& read, T* dq,
               bool more, const T* decay, const T* next) {
  constexpr int lanes = kLanes<T>, slots = kSlots<T, N>;
  Row<T, N> seen[slots], outputs[slots];
  for (int64_t start = 0; start < K; start += lanes) {
    const int64_t stop = std::min<int64_t>(K, start + lanes);
    Vector<T> dots[lanes];
    if (kRead == Read::kGradients && stop - start < lanes)
      for (auto& x : dots) x = Vector<T>{};
    over_rows<slots>(start, stop, [&](int64_t c, int slot) {
      Vector<T> dot{};
      for (int j = 0; j < N; ++j) {
        Vector<T> x = load<T>(from + (c * N + j) * lanes) + k[c] * u.x[j];
        if (kRead == Read::kOutputs) outputs[slot].x[j] += q[c] * x;
        if (kRead == Read::kGradients) dot += x * read.x[j];
        if (kDecay == Decay::kNumber) x *= decay[0];
        if (kDecay == Decay::kChannel) x *= decay[c];
        store<T>(to + (c * N + j) * lanes, x);
        seen[slot].x[j] += next[c] * x;
      }
      if (kRead == Read::kGradients) dots[c - start] = dot;
    });
    if (kRead == Read::kGradients) put<T>(dq + start, sums<T>(dots), stop - start, more);
  }
  if (kRead == Read::kOutputs) read = total<T, N>(outputs);
  return total<T, N>(seen);
}

// One step backward, as the head of this file says. ds: dS before, and after it the gradient by the state that the step before
// this one left; if this is its token's first (kFirst), with what the token before reads by its query: q_before do_before^T.
// Returns ds^T k_before.
template <typename T, int N, Decay kDecay, bool kFirst>
Row<T, N> step_back(int64_t K, T* ds, const T* before, const T* k, const Row<T, N>& u, const Row<T, N>& beta_du, T* dk,
                    const T* decay, T* ddecay, bool more, const T* q_before, const Row<T, N>& do_before, const T* k_before) {
  constexpr int lanes = kLanes<T>, slots = kSlots<T, N>;
  Row<T, N> du[slots];
  Vector<T> change[slots] = {};
  for (int64_t start = 0; start < K; start += lanes) {
    const int64_t stop = std::min<int64_t>(K, start + lanes);
    Vector<T> by_key[lanes], by_decay[lanes];
    if (stop - start < lanes)
      for (int i = 0; i < lanes; ++i) by_key[i] = by_decay[i] = Vector<T>{};
    over_rows<slots>(start, stop, [&](int64_t c, int slot) {
      Vector<T> dot{}, inner{};
      for (int j = 0; j < N; ++j) {
        const Vector<T> s = load<T>(before + (c * N + j) * lanes);
        Vector<T> x = load<T>(ds + (c * N + j) * lanes);
        dot += x * u.x[j];
        dot -= s * beta_du.x[j];
        x -= k[c] * beta_du.x[j];
        if (kDecay != Decay::kNone) inner += s * x;
        if (kDecay == Decay::kNumber) x *= decay[0];
        if (kDecay == Decay::kChannel) x *= decay[c];
        if (kFirst) x += q_before[c] * do_before.x[j];
        store<T>(ds + (c * N + j) * lanes, x);
        du[slot].x[j] += k_before[c] * x;
      }
      by_key[c - start] = dot;
      if (kDecay == Decay::kNumber) change[slot] += inner;
      if (kDecay == Decay::kChannel) by_decay[c - start] = inner;
    });
    put<T>(dk + start, sums<T>(by_key), stop - start, more);
    if (kDecay == Decay::kChannel) put<T>(ddecay + start, sums<T>(by_decay), stop - start, more);
  }
  if (kDecay == Decay::kNumber) {
    for (int slot = 1; slot < slots; ++slot) change[0] += change[slot];
    ddecay[0] = sum<T>(change[0]) + (more ? ddecay[0] : 0);
  }
  return total<T, N>(du);
}

// A block of columns between an array [K, V] and a state of its own; `f(c, row)` may change each row on its way.
template <typename T, int N, typename F>
void unpack(const Sizes& size, const T* array, int64_t columns, T* state, const F& f) {
  for (int64_t c = 0; c < size.K; ++c) {
    Row<T, N> row = Row<T, N>::from(array + c * size.V, columns);
    f(c, row);
    row.to(state + c * N * kLanes<T>, N * kLanes<T>);
  }
}

template <typename T, int N>
void pack(const Sizes& size, const T* state, T* array, int64_t columns) {
  for (int64_t c = 0; c < size.K; ++c)
    Row<T, N>::from(state + c * N * kLanes<T>, N * kLanes<T>).to(array + c * size.V, columns);
}

template <typename T, int N>
inline void add(Row<T, N>& row, T factor, const Row<T, N>& other) {
  for (int j = 0; j < N; ++j) row.x[j] += factor * other.x[j];
}

// `f` with the kind of decay that there is, as a constant.
template <typename F>
inline auto with_decay(int64_t decays, const F& f) {
  if (decays == 0) return f(std::integral_constant<Decay, Decay::kNone>());
  if (decays == 1) return f(std::integral_constant<Decay, Decay::kNumber>());
  return f(std::integral_constant<Decay, Decay::kChannel>());
}

// Step i from one state to the next (which may be the same memory), whatever comes after it.
template <typename T, int N, Read kRead>
Row<T, N> advance(const Head<T>& head, int64_t i, const T* from, T* to, const Row<T, N>& u, Row<T, N>& read, T* dq = nullptr,
                  bool more = false) {
  const Sizes& size = head.size;
  const int64_t token = i / size.R;
  const bool ends = i + 1 == size.steps();
  const T *k = head.key(i), *next = head.key(ends ? i : i + 1), *q = head.query(token);
  if ((i + 1) % size.R)
    return step<T, N, Decay::kNone, Read::kNothing>(size.K, from, to, k, u, q, read, dq, more, nullptr, next);
  const T* decay = ends ? nullptr : head.decay_of(token + 1);
  return with_decay(ends ? 0 : size.decays, [&](auto kind) {
    return step<T, N, kind, kRead>(size.K, from, to, k, u, q, read, dq, more, decay, next);
  });
}

// One head's block of columns, forward. All pointers are at the block's first column; checkpoints: null, or one state a chunk.
template <typename T, int N>
void forward(const Head<T>& head, int64_t columns, int64_t column, const T* initial, T* o, T* final, T* checkpoints) {
  const Sizes& size = head.size;
  T* state = Scratch::of<T>(size.K * N * kLanes<T>);
  Row<T, N> seen;
  unpack<T, N>(size, initial, columns, state, [&](int64_t c, Row<T, N>& row) {
    if (size.decays) row = row.times(head.decay_of(0)[size.decays == 1 ? 0 : c]);
    add<T, N>(seen, head.key(0)[c], row);
  });
  for (int64_t i = 0; i < size.steps(); ++i) {
    if (checkpoints && i % (size.chunk * size.R) == 0)
      pack<T, N>(size, state, checkpoints + i / (size.chunk * size.R) * size.K * size.V, columns);
    const Row<T, N> u = Row<T, N>::from(head.value(i) + column, columns).minus(seen).times(head.step_size(i));
    Row<T, N> read;
    seen = advance<T, N, Read::kOutputs>(head, i, state, state, u, read);
    if ((i + 1) % size.R == 0) read.to(o + i / size.R * size.HV * size.V, columns);
  }
  pack<T, N>(size, state, final, columns);
}

// What `backward` writes, at its head.
template <typename T>
struct Gradients {
  T *dq, *dk, *dv, *dbeta, *ddecay, *dinitial;
};

// One head's block of columns, backward. Arrays with columns are given at the block's first one; it adds to the sums over columns
// unless it is the head's first.
template <typename T, int N>
void backward(const Head<T>& head, int64_t columns, int64_t column, const T* checkpoints, const T* dout, const T* dfinal,
              const Gradients<T>& to) {
  const Sizes& size = head.size;
  const int64_t most = size.chunk * size.R, one = size.K * N * kLanes<T>, wide = N * kLanes<T>;
  const bool more = column > 0;
  T* states = Scratch::of<T>((most + 2) * one + 2 * most * wide);
  T *ds = states + (most + 1) * one, *changes = ds + one, *errors = changes + most * wide;
  auto dout_of = [&](int64_t token) { return Row<T, N>::from(dout + token * size.HV * size.V, columns); };

  const int64_t end = size.steps();
  Row<T, N> du;
  const Row<T, N> dlast = dout_of(size.T - 1);
  unpack<T, N>(size, dfinal, columns, ds, [&](int64_t c, Row<T, N>& row) {
    add<T, N>(row, head.query(size.T - 1)[c], dlast);
    add<T, N>(du, head.key(end - 1)[c], row);
  });
  for (int64_t chunk = size.chunks() - 1; chunk >= 0; --chunk) {
    const int64_t first = chunk * most, stop = std::min(first + most, end);
    Row<T, N> seen;
    unpack<T, N>(size, checkpoints + chunk * size.K * size.V, columns, states,
                 [&](int64_t c, Row<T, N>& row) { add<T, N>(seen, head.key(first)[c], row); });
    for (int64_t i = first; i < stop; ++i) {
      const Row<T, N> error = Row<T, N>::from(head.value(i) + column, columns).minus(seen);
      const Row<T, N> u = error.times(head.step_size(i));
      error.to(errors + (i - first) * wide, wide);
      u.to(changes + (i - first) * wide, wide);
      T* state = states + (i - first) * one;
      Row<T, N> read = dout_of(i / size.R);
      seen = advance<T, N, Read::kGradients>(head, i, state, state + one, u, read, to.dq + i / size.R * size.HV * size.K,
                                             more);
    }
    for (int64_t i = stop - 1; i >= first; --i) {
      const Row<T, N> u = Row<T, N>::from(changes + (i - first) * wide, wide);
      const Row<T, N> beta_du = du.times(head.step_size(i));
      beta_du.to(to.dv + i * size.HV * size.V, columns);
      const T dbeta = du.dot(Row<T, N>::from(errors + (i - first) * wide, wide));
      to.dbeta[i * size.HV] = more ? to.dbeta[i * size.HV] + dbeta : dbeta;
      const T *state = states + (i - first) * one, *k = head.key(i), *k_before = head.key(i ? i - 1 : 0);
      T* dk = to.dk + i * size.HV * size.K;
      if (i % size.R) {
        du = step_back<T, N, Decay::kNone, false>(size.K, ds, state, k, u, beta_du, dk, nullptr, nullptr, more, nullptr, {}, k_before);
        continue;
      }
      const int64_t token = i / size.R, before = token ? token - 1 : 0;
      const Row<T, N> dbefore = token ? dout_of(before) : Row<T, N>();
      const T *decay = head.decay_of(token), *q = head.query(before);
      T* ddecay = to.ddecay + token * size.HV * size.decays;
      du = with_decay(size.decays, [&](auto kind) {
        return step_back<T, N, kind, true>(size.K, ds, state, k, u, beta_du, dk, decay, ddecay, more, q, dbefore, k_before);
      });
    }
  }
  pack<T, N>(size, ds, to.dinitial, columns);
}

// `f` with the number of vectors that so many columns need, as a constant.
template <typename T, typename F>
void with_vectors(int64_t columns, const F& f) {
  if (columns <= kLanes<T>) return f(std::integral_constant<int, 1>());
  if (columns <= 2 * kLanes<T>) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 4>());
}

// Sizes from the arguments' last dimensions; what stands before them (one of `vmap` too) is the batch.
template <typename Buffer>
Sizes sizes(const Buffer& k, const Buffer& v, const Buffer& decay, int64_t chunk) {
  const auto keys = k.dimensions(), values = v.dimensions();
  const auto n = keys.size();
  Sizes size;
  for (std::size_t i = 0; i + 4 < n; ++i) size.B *= keys[i];
  size.T = keys[n - 4];
  size.R = keys[n - 3];
  size.H = keys[n - 2];
  size.K = keys[n - 1];
  size.HV = values[n - 2];
  size.V = values[n - 1];
  size.decays = decay.dimensions().back();
  size.chunk = chunk;
  return size;
}

// Of V in a block, whatever the shapes and however many processors: so the order of sums does not depend on them.
template <typename T>
constexpr int64_t kColumns = 4 * kLanes<T>;

ffi::Error ended(bool complete) {
  return complete ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted, "delta product: out of memory");
}

template <ffi::DataType kType>
ffi::Error run_forward(ffi::ThreadPool pool, ffi::Buffer<kType> q, ffi::Buffer<kType> k, ffi::Buffer<kType> v,
                       ffi::Buffer<kType> beta, ffi::Buffer<kType> decay, ffi::Buffer<kType> initial,
                       ffi::ResultBuffer<kType> o, ffi::ResultBuffer<kType> final, ffi::ResultBuffer<kType> checkpoints,
                       int64_t chunk) {
  using T = ffi::NativeType<kType>;
  const Sizes size = sizes(k, v, decay, chunk);
  const bool keep = checkpoints->element_count() > 0;
  const int64_t blocks = (size.V + kColumns<T> - 1) / kColumns<T>;
  return ended(deltajax::parallel_for(pool, size.B * size.HV * blocks, [&](int64_t task) {
    const int64_t column = task % blocks * kColumns<T>, b = task / blocks / size.HV, h = task / blocks % size.HV;
    const int64_t count = std::min(kColumns<T>, size.V - column);
    const Head<T> head(size, b, h, q.typed_data(), k.typed_data(), v.typed_data(), beta.typed_data(), decay.typed_data());
    const int64_t row = b * size.HV + h, state = row * size.K * size.V + column;
    with_vectors<T>(count, [&](auto vectors) {
      forward<T, vectors>(head, count, column, initial.typed_data() + state,
                          o->typed_data() + (b * size.T * size.HV + h) * size.V + column, final->typed_data() + state,
                          keep ? checkpoints->typed_data() + row * size.chunks() * size.K * size.V + column : nullptr);
    });
  }));
}

template <ffi::DataType kType>
ffi::Error run_backward(ffi::ThreadPool pool, ffi::Buffer<kType> q, ffi::Buffer<kType> k, ffi::Buffer<kType> v,
                        ffi::Buffer<kType> beta, ffi::Buffer<kType> decay, ffi::Buffer<kType> checkpoints,
                        ffi::Buffer<kType> dout, ffi::Buffer<kType> dfinal, ffi::ResultBuffer<kType> dq,
                        ffi::ResultBuffer<kType> dk, ffi::ResultBuffer<kType> dv, ffi::ResultBuffer<kType> dbeta,
                        ffi::ResultBuffer<kType> ddecay, ffi::ResultBuffer<kType> dinitial, int64_t chunk) {
  using T = ffi::NativeType<kType>;
  const Sizes size = sizes(k, v, decay, chunk);
  return ended(deltajax::parallel_for(pool, size.B * size.HV, [&](int64_t row) {
    const int64_t b = row / size.HV, h = row % size.HV;
    const Head<T> head(size, b, h, q.typed_data(), k.typed_data(), v.typed_data(), beta.typed_data(), decay.typed_data());
    const int64_t token = b * size.T * size.HV + h, step = b * size.steps() * size.HV + h;
    for (int64_t column = 0; column < size.V; column += kColumns<T>) {
      const int64_t count = std::min(kColumns<T>, size.V - column), state = row * size.K * size.V + column;
      const Gradients<T> to{dq->typed_data() + token * size.K,
                            dk->typed_data() + step * size.K,
                            dv->typed_data() + step * size.V + column,
                            dbeta->typed_data() + step,
                            ddecay->typed_data() + token * size.decays,
                            dinitial->typed_data() + state};
      with_vectors<T>(count, [&](auto vectors) {
        backward<T, vectors>(head, count, column, checkpoints.typed_data() + row * size.chunks() * size.K * size.V + column,
                             dout.typed_data() + token * size.V + column, dfinal.typed_data() + state, to);
      });
    }
  }));
}

template <ffi::DataType kType>
auto forward_binding() {
  using In = ffi::Buffer<kType>;
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<In>().template Arg<In>().template Arg<In>().template Arg<In>().template Arg<In>().template Arg<In>()
      .template Ret<In>().template Ret<In>().template Ret<In>()
      .template Attr<int64_t>("chunk");
}

template <ffi::DataType kType>
auto backward_binding() {
  using In = ffi::Buffer<kType>;
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<In>().template Arg<In>().template Arg<In>().template Arg<In>()
      .template Arg<In>().template Arg<In>().template Arg<In>().template Arg<In>()
      .template Ret<In>().template Ret<In>().template Ret<In>().template Ret<In>().template Ret<In>().template Ret<In>()
      .template Attr<int64_t>("chunk");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(deltajax_delta_product_forward_float32, run_forward<ffi::F32>, forward_binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(deltajax_delta_product_forward_float64, run_forward<ffi::F64>, forward_binding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(deltajax_delta_product_backward_float32, run_backward<ffi::F32>, backward_binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(deltajax_delta_product_backward_float64, run_backward<ffi::F64>, backward_binding<ffi::F64>());

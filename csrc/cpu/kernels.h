// What a kernel is: the op contract, and the table of one instruction set's kernels.
//
// An op is a pure function of (args, ctx, tid, nt): no OpenMP inside, no allocation, no throw, no global. Its work is
// cut into grains whose borders depend on shapes only, and one thread adds up a sum, in a fixed order. So the bits are
// the same for any nt. Running tid = 0..nt-1 one after the other gives the same result as running them at once.

#pragma once

#include <cstddef>

#include "plan/plan.h"

namespace narrows {

// A matrix with any strides (in elements); `padded` says that rows are contiguous and may be read up to a multiple of
// LANES columns.
template <class T>
struct Matrix {
  T* data = nullptr;
  index_t rows = 0, cols = 0, row_stride = 0, col_stride = 1;
  bool padded = false;

  T* row(index_t i) const { return data + i * row_stride; }
};

// The data of the user: dense rows with any strides (in bytes), or CSR. Read-only, float32 or float64.
struct SourceView {
  bool bound = false;
  index_t rows = 0, cols = 0;
  bool is_double = false;
  const char* data = nullptr;  // dense elements, or the values of CSR
  index_t row_stride = 0, col_stride = 0;
  bool is_csr = false, is_index64 = false;
  index_t stored = 0;  // values of CSR
  const void *indptr = nullptr, *indices = nullptr;
};

// A reference to a function object that is called through a pointer: what takes one is compiled once for all of them. A
// call works on a copy of the object, which the compiler can keep in registers, since nothing else can change it.
template <class Signature>
class FunctionRef;
template <class R, class... A>
class FunctionRef<R(A...)> {
 public:
  FunctionRef() = default;
  template <class Fn>
  __attribute__((always_inline)) FunctionRef(const Fn& fn)
      : object_(&fn), call_([](const void* object, A... a) -> R {
          const Fn copy = *static_cast<const Fn*>(object);
          return copy(a...);
        }) {}
  __attribute__((always_inline)) R operator()(A... a) const { return call_(object_, a...); }
  __attribute__((always_inline)) explicit operator bool() const { return call_; }

 private:
  const void* object_ = nullptr;
  R (*call_)(const void*, A...) = nullptr;
};

// Where a tile lies in the result of a product.
struct Tile {
  index_t row, col;
  int rows;
  index_t cols;
};
// Takes the values of a finished tile.
template <class T>
using Epilogue = FunctionRef<void(const Tile&, T*)>;
// What an epilogue updates: a weight and its moments, of the shape of the product. Or nothing.
template <class T>
struct Update {
  Matrix<T> W, m, v;
};

// A product in bfloat16: see gemm_bfloat16.inl.
using PairProduct = void (*)(Matrix<const float> A, Matrix<const float> B, Matrix<float> partial, float* scratch,
                             Epilogue<float> epilogue, int tid, int nt, const Update<float>& update);

// The values of a step that an op may use besides its operands.
template <class T>
struct Context {
  index_t m = 0;                   // rows of the batch
  const index_t* rows = nullptr;   // their rows in the sources
  bool learn = false;              // a training step: the loss writes its gradient
  bool split_rows = true;          // threads share products over the batch by rows, else by tiles
  PairProduct bfloat16 = nullptr;  // makes products in bfloat16; null: in T
  uint64_t seed = 0;
  uint32_t step = 0;
  double learning_rate = 0;
  double kl_factor = 1;                 // multiplies the strength of the KL term of a variational network
  double momentum = -1;                 // of Sgd; below 0: the op has its own
  double adam_rate = 0, adam_root = 0;  // of Adam: rate / (1 - beta_1**t), 1 / sqrt(1 - beta_2**t)
  const SourceView* sources = nullptr;
  T* regions[4] = {};  // parameters, gradients, first and second moments
  index_t parameter_size = 0;
  T* scratch = nullptr;  // thread tid uses the elements from tid * scratch_stride on
  index_t scratch_stride = 0;
};

constexpr index_t PACK_DEPTH = 512;           // rows of a packed panel: with 64 columns it stays in L2
constexpr index_t SCRATCH = PACK_DEPTH * 64;  // elements of scratch memory of one thread for products in its own type
constexpr index_t TURNED_DEPTH = 2048;   // the most outputs of a layer whose input gradient may be a transposed product
constexpr index_t TURNED_GROUP = 8;      // tiles of such a product that are transposed together
constexpr index_t SPARSE_COLUMNS = 192;  // columns of CSR rows that are taken at a time
constexpr index_t SPARSE_PANEL = 128;    // outputs of their layer that are taken at a time, at most
constexpr index_t SPARSE_CURSOR = 16;    // bytes of scratch memory for each row of the batch
constexpr index_t GRAM_ROWS = 256;       // rows of the batch whose squared error is taken at a time in Gram form
constexpr index_t IMAGE = 1 << 16;       // pairs of bfloat16 in an image of A, if it can be as small

// Of COUNTS: arrays of a row that a thread keeps in scratch memory, and the elements of one, for so many features.
constexpr index_t COUNT_ARRAYS = 12;
inline index_t count_room(index_t features) { return padded(features + 1); }

// The operands of an op, by the names that ops.h gives them. (Always inline, as each instruction set compiles its own.)
template <class T>
struct Args {
  Matrix<T> slots[MAX_SLOTS];  // data is null where an operand is absent; batch slots have `batch` set
  bool batch[MAX_SLOTS] = {};
  int ints[MAX_INTS] = {};
  double floats[MAX_FLOATS] = {};
  bool turned = false;  // DGRAD: as a transposed product

  __attribute__((always_inline)) const Matrix<T>& operator[](Slot slot) const { return slots[int(slot)]; }
  __attribute__((always_inline)) int operator[](Int i) const { return ints[int(i)]; }
  __attribute__((always_inline)) double operator[](Float f) const { return floats[int(f)]; }
};

constexpr Slot JACOBIAN_WEIGHTS[] = {op::JACOBIAN::W2, op::JACOBIAN::W3, op::JACOBIAN::W4};

// The blocks of JACOBIAN: widths of the layers, elements from one row to the next, rows of a block, the widest row.
// Then the elements of scratch memory of a thread. A block fits into L2 with the Gram matrix and its gradient.
struct JacobianBlock {
  using O = op::JACOBIAN;
  static constexpr index_t SIZE = 40000, ROWS = 48, TILE = 6;
  int layers = 1;
  index_t widths[JACOBIAN_LAYERS] = {}, ld[JACOBIAN_LAYERS] = {}, rows, widest, scratch;

  template <class T>
  explicit JacobianBlock(const Args<T>& args) {
    widths[0] = args[O::gram].cols, ld[0] = widest = padded(widths[0]);
    for (; layers < JACOBIAN_LAYERS && args[JACOBIAN_WEIGHTS[layers - 1]].data; ++layers)
      widths[layers] = args[JACOBIAN_WEIGHTS[layers - 1]].cols, ld[layers] = padded(widths[layers]);
    index_t sum = 0;
    for (int i = 0; i < layers - 1; ++i) {
      sum += (i < layers - 2 ? 2 : 1) * ld[i];
      if (ld[i] > widest) widest = ld[i];
    }
    rows = SIZE / widest / TILE * TILE;
    if (rows < ROWS) rows = ROWS;
    // With noise there is a second chain, and the derivative by the difference of both is kept for it.
    const index_t chains = args[O::noisy].data ? 2 * sum + ld[0] : sum;
    scratch = SCRATCH + widths[layers - 1] * ld[layers - 2] + rows * (chains + 2 * widest);
  }
};

template <class T>
using Op = void (*)(const Args<T>&, const Context<T>&, int tid, int nt);

// A single fused layer, for libraries. Every operand has its own strides. The bias may be null.
template <class T>
struct LayerArgs {
  Matrix<const T> x, W;
  const T* bias = nullptr;
  Matrix<T> out, pre;  // pre.data may be null
  T* scratch = nullptr;
  PairProduct bfloat16 = nullptr;
};

// What an op takes on a batch of this many rows.
struct Cost {
  index_t scratch = 0;    // elements of scratch memory of a thread
  double flop = 0;        // of its products
  bool turnable = false;  // whether its input gradient may be made as a transposed product
};

// How an op runs.
template <class T>
struct Kernel {
  // The function for the op's activation, loss or solver; null if there is none.
  Op<T> (*run)(const Args<T>&);
  Cost (*cost)(const Args<T>&, index_t batch, bool bfloat16);
};

template <class T>
struct Kernels {
  Kernel<T> ops[OP_COUNT];
  // out = activation(x W + b)
  void (*dense)(int activation, const LayerArgs<T>&, int tid, int nt);
  // out = activation(z + b) for a given z; pre as in dense, x and W unused
  void (*activate)(int activation, Matrix<const T> z, const LayerArgs<T>&, int tid, int nt);
  // out = dA * activation'(saved), elementwise
  void (*slope)(int activation, Matrix<const T> dA, Matrix<const T> saved, Matrix<T> out, int tid, int nt);
  // out[j] = sum of column j
  void (*colsum)(Matrix<const T> x, T* out, int tid, int nt);
  // Does n rounds of multiply-adds in registers, one for each accumulator of the micro-kernel. Returns the number of
  // operations.
  double (*fma_probe)(index_t n);
  // Makes products in bfloat16, two multiply-adds for each pair; null unless T is float.
  PairProduct bfloat16;
  // out = the function `name` of each element of x; a loss has the given target. False if there is no such function.
  bool (*evaluate)(const char* name, T target, const T* x, T* out, index_t n);
};

// A thread's share of n grains.
struct Range {
  index_t begin, end;
  Range(index_t n, int tid, int nt) : begin(n * tid / nt), end(n * (tid + 1) / nt) {}
};

}  // namespace narrows

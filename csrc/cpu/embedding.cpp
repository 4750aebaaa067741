#include "embedding.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "embedding.inl"
#include "per_isa.inl"

namespace {
constexpr int64_t kGrain = 1 << 14;  // numbers that are worth a thread
constexpr int64_t kColumns = 64;     // columns of a row that one thread adds: whole cache lines
constexpr int64_t kAdded = 1 << 17;  // additions that are worth a thread
}  // namespace

template <typename Table, typename Out>
void embed(
    const Pool& pool, Rows<float> rows, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out,
    int64_t count, int64_t d) {
    pool.run(count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(embed_rows, rows, table, ids, prompt_rows, out, begin, end, d)
    });
}

template <typename T>
void embed_backward(
    const Pool& pool, Rows<T> dx, const int64_t* prompt_rows, Rows<float> grad, int64_t count, int64_t k, int64_t d) {
    const int64_t pieces = (d + kColumns - 1) / kColumns;
    const int64_t grain = std::max<int64_t>(1, kAdded / (kColumns * std::max<int64_t>(1, count + k)));
    pool.run(pieces, grain, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(d, end * kColumns);
        EMBEDGRAD_DISPATCH(add_columns, dx, prompt_rows, grad, count, k, begin * kColumns, last)
    });
}

#define EMBEDGRAD_OF(Table, Out) \
    template void embed(         \
        const Pool&, Rows<float>, Rows<Table>, const int64_t*, const int64_t*, Rows<Out>, int64_t, int64_t);
EMBEDGRAD_OF(float, float)
EMBEDGRAD_OF(float, Bf16)
EMBEDGRAD_OF(Bf16, float)
EMBEDGRAD_OF(Bf16, Bf16)
template void embed_backward(const Pool&, Rows<float>, const int64_t*, Rows<float>, int64_t, int64_t, int64_t);
template void embed_backward(const Pool&, Rows<Bf16>, const int64_t*, Rows<float>, int64_t, int64_t, int64_t);

}  // namespace embedgrad

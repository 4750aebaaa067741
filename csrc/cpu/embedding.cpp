#include "embedding.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "non_temporal.h"
#include "isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "embedding.inl"
#include "per_isa.inl"

namespace {
constexpr int64_t kAdditionsPerThread = 1 << 17;  // fewer additions than this are not worth another thread
}  // namespace

template <typename Table, typename Out>
void embed(
    const Pool& pool, Rows<float> prompt, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows,
    Rows<Out> out, int64_t count, int64_t d) {
    const bool non_temporal = prefers_non_temporal(out, count, d);
    pool.run(count, rows_per_thread(d), [&](int64_t begin, int64_t end) {
        if (non_temporal) {
            EMBEDGRAD_DISPATCH(embed_rows<true>, prompt, table, ids, prompt_rows, out, begin, end, d)
        } else {
            EMBEDGRAD_DISPATCH(embed_rows<false>, prompt, table, ids, prompt_rows, out, begin, end, d)
        }
    });
}

template <typename T>
void embed_backward(
    const Pool& pool, Rows<T> dx, const int64_t* prompt_rows, Rows<float> grad, int64_t count, int64_t k, int64_t d) {
    // A counting sort: positions[first[r]] to positions[first[r + 1] − 1] are the positions of prompt row r.
    std::vector<int64_t> first(k + 1, 0), positions(count);
    for (int64_t i = 0; i < count; ++i)
        if (prompt_rows[i] >= 0) ++first[prompt_rows[i] + 1];
    for (int64_t r = 0; r < k; ++r) first[r + 1] += first[r];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < count; ++i)
        if (prompt_rows[i] >= 0) positions[next[prompt_rows[i]]++] = i;
    const int64_t grain = kAdditionsPerThread * k / std::max<int64_t>(1, d * (count + k));
    pool.run(k, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(add_rows, dx, first.data(), positions.data(), grad, begin, end, d)
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

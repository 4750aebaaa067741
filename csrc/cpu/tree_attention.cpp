#include "tree_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace embedgrad {
namespace {

constexpr int64_t kChunk = 8;      // panels whose scores exist at once; they fit the cache together with q and o
constexpr int64_t kSpareRows = 3;  // rows behind a block's last row, because the last tile of a product may have 4 rows

int64_t panels_of(int64_t keys) { return (keys + kPanel - 1) / kPanel; }
int64_t padded_to_panels(int64_t n) { return panels_of(n) * kPanel; }

// Floats for one block's rows, scores and sums: what forward_block or backward_block takes from its bump allocator.
int64_t block_floats(int64_t rows, int64_t padded, bool backward) {
    const int64_t wide = backward ? 3 * padded + 2 * kChunk * kPanel : 2 * padded + kChunk * kPanel;
    return padded_to_panels((rows + kSpareRows) * (wide + 2) + 7 * 16);
}

// Floats for two arrays of `threads + 1` int64_t.
int64_t share_floats(int64_t threads) { return padded_to_panels(4 * (threads + 1)); }

// A bump allocator of 64-byte aligned arrays.
class BumpAllocator {
public:
    explicit BumpAllocator(float* data) : data_(data) {}
    float* take(int64_t n) {
        float* taken = data_;
        data_ += padded_to_panels(n);
        return taken;
    }

private:
    float* data_;
};

// An entry of the schedule: the queries [from, to) of a block see some key of this panel; `partly`: not all see every
// key.
struct Seen {
    int32_t panel, from, to, partly;

    bool by(int64_t query) const { return from <= query && query < to; }
    bool follows(const Seen& other) const { return panel == other.panel + 1 && from == other.from && to == other.to; }
};

// The schedule's arrays and the sizes of one call.
struct Plan {
    const TreeMask& mask;
    TreeShape shape;
    int64_t panels, padded, size;  // padded: head_dim rounded up to whole panels; size: floats of one kv head's keys
    const int32_t *begin, *end, *position, *first_seen, *cost;
    const Seen* seen;

    Plan(const TreeMask& m, const int32_t* schedule, const TreeShape& s)
        : mask(m), shape(s), panels(panels_of(m.keys)), padded(padded_to_panels(s.head_dim)),
          size(panels * kPanel * padded), begin(schedule), end(begin + panels * kPanel), position(end + panels * kPanel),
          first_seen(position + panels * kPanel), cost(first_seen + m.blocks + 1),
          seen(reinterpret_cast<const Seen*>(cost + m.blocks)) {}

    int64_t heads_per_kv_head() const { return shape.heads / shape.kv_heads; }
    int64_t items() const { return shape.kv_heads * mask.blocks; }
    int64_t most_rows() const {
        int64_t most = 0;
        for (int64_t b = 0; b < mask.blocks; ++b)
            most = std::max<int64_t>(most, mask.block_start[b + 1] - mask.block_start[b]);
        return most * heads_per_kv_head();
    }
};

// A block of queries with the query heads of one kv head: rows = queries · heads per kv head. It sees `count` panels.
struct Block {
    int64_t kv_head, first, queries, rows, count;
    const Seen* seen;

    Block(const Plan& plan, int64_t item)
        : kv_head(item / plan.mask.blocks), first(plan.mask.block_start[item % plan.mask.blocks]),
          queries(plan.mask.block_start[item % plan.mask.blocks + 1] - first), rows(queries * plan.heads_per_kv_head()),
          count(plan.first_seen[item % plan.mask.blocks + 1] - plan.first_seen[item % plan.mask.blocks]),
          seen(plan.seen + plan.first_seen[item % plan.mask.blocks]) {}
};

// Thread i gets the items [range[i], range[i + 1]), of about the same cost for every thread.
void share(const Plan& plan, int64_t threads, int64_t* range) {
    double total = 0, sum = 0;
    const auto cost_of = [&](int64_t item) { return static_cast<double>(plan.cost[item % plan.mask.blocks]); };
    for (int64_t item = 0; item < plan.items(); ++item) total += cost_of(item);
    int64_t next = 0;
    range[next++] = 0;
    for (int64_t item = 0; item < plan.items(); ++item) {
        const double cost = cost_of(item), middle = sum + cost / 2;
        while (next < threads && middle > total * static_cast<double>(next) / static_cast<double>(threads))
            range[next++] = item;
        sum += cost;
    }
    while (next <= threads) range[next++] = plan.items();
}

// A thread's items belong to neighbouring kv heads. For each of them the thread has its own sum of dk and dv, a part.
// Parts are added in the order of the threads, so the same number of threads gives the same bits.
struct Parts {
    const int64_t *range, *first_part;  // [threads + 1]
    int64_t threads, blocks;

    int64_t first_kv_head(int64_t thread) const { return range[thread] / blocks; }
    int64_t of(int64_t thread) const {
        return range[thread] < range[thread + 1] ? (range[thread + 1] - 1) / blocks - first_kv_head(thread) + 1 : 0;
    }
    // The thread's part of a kv head, or −1.
    int64_t part(int64_t thread, int64_t kv_head) const {
        const int64_t at = kv_head - first_kv_head(thread);
        return 0 <= at && at < of(thread) ? first_part[thread] + at : -1;
    }
};

// Keys and values of one kv head: rows [panels · kPanel, padded] and panels [panels, padded, kPanel]; null where
// unused.
struct Keys {
    const float *k_rows, *v_rows, *k_panels, *v_panels;
};

}  // namespace

#define EMBEDGRAD_KERNELS "tree_attention.inl"
#include "per_isa.inl"

namespace {

// Rows and panels of k or v, kv head by kv head.
template <typename T>
void lay_out(const Pool& pool, const Plan& plan, Heads<T> x, float* rows, float* transposed) {
    pool.run(plan.shape.kv_heads * plan.panels, 8, [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(lay_out_panels, plan, x, rows, transposed, begin, end)
    });
}

}  // namespace

std::vector<int32_t> tree_schedule(const TreeMask& m) {
    const int64_t panels = panels_of(m.keys), padded = panels * kPanel;
    std::vector<int32_t> schedule(3 * padded + 2 * m.blocks + 1, 0);
    int32_t *begin = schedule.data(), *end = begin + padded, *position = end + padded;
    std::fill(begin + m.keys, end, std::numeric_limits<int32_t>::max());
    std::copy(m.key_begin, m.key_begin + m.keys, begin);
    std::copy(m.key_end, m.key_end + m.keys, end);
    if (m.key_position) std::copy(m.key_position, m.key_position + m.keys, position);
    struct Bounds {
        int32_t low, high;
    };
    const auto bounds = [](const int32_t* x, int64_t n) {
        const auto found = std::minmax_element(x, x + n);
        return Bounds{*found.first, *found.second};
    };
    std::vector<Bounds> begins, ends, positions;
    for (int64_t p = 0; p < panels; ++p) {
        begins.push_back(bounds(begin + p * kPanel, kPanel));
        ends.push_back(bounds(end + p * kPanel, kPanel));
        positions.push_back(bounds(position + p * kPanel, std::min(kPanel, m.keys - p * kPanel)));
    }
    std::vector<int32_t> seen;
    int32_t* const first_seen = schedule.data() + 3 * padded;
    int32_t* const cost = first_seen + m.blocks + 1;
    for (int64_t b = 0; b < m.blocks; ++b) {
        const int32_t *const first = m.query_index + m.block_start[b], *const stop = m.query_index + m.block_start[b + 1];
        const Bounds queries =
            m.query_position ? bounds(m.query_position + m.block_start[b], stop - first) : Bounds{0, 0};
        cost[b] = static_cast<int32_t>(stop - first);
        for (int64_t p = 0; p < panels; ++p) {
            const int32_t* const from = std::lower_bound(first, stop, begins[p].low);
            const int32_t* const to = std::lower_bound(from, stop, ends[p].high);
            if (from == to) continue;
            bool partly = begins[p].high > *from || ends[p].low <= to[-1];
            if (m.query_position) {
                if (queries.low - positions[p].high >= m.window) continue;
                partly = partly || queries.high - positions[p].low >= m.window;
            }
            for (const int64_t value : {p, from - first, to - first, static_cast<int64_t>(partly)})
                seen.push_back(static_cast<int32_t>(value));
            cost[b] += static_cast<int32_t>(to - from);
        }
        first_seen[b + 1] = static_cast<int32_t>(seen.size() / 4);
    }
    schedule.insert(schedule.end(), seen.begin(), seen.end());
    return schedule;
}

bool fits(const TreeMask& m, const int32_t* schedule, int64_t length) {
    const int64_t arrays = 3 * padded_to_panels(m.keys), fixed = arrays + 2 * m.blocks + 1;
    return length >= fixed && length == fixed + 4 * int64_t{schedule[arrays + m.blocks]};
}

int64_t tree_attention_floats(int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t threads) {
    const int64_t d = padded_to_panels(head_dim), size = padded_to_panels(keys) * d;
    return 2 * kv_heads * size + share_floats(threads) + threads * block_floats(rows, d, false);
}

int64_t tree_attention_backward_floats(
    int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t threads, bool wants_dq, bool wants_dkv) {
    const int64_t d = padded_to_panels(head_dim), size = padded_to_panels(keys) * d;
    const int64_t laid = (wants_dq ? 3 : 2) * kv_heads, sums = wants_dkv ? 2 * (threads + kv_heads - 1) : 0;
    return (laid + sums) * size + share_floats(threads) + threads * block_floats(rows, d, true);
}

template <typename T>
void tree_attention(
    const Pool& pool, const TreeMask& mask, const int32_t* schedule, const TreeShape& shape, Heads<T> q, Heads<T> k,
    Heads<T> v, Heads<T> out, float* lse, float* memory) {
    const Plan plan(mask, schedule, shape);
    const int64_t threads = pool.threads(), each = block_floats(plan.most_rows(), plan.padded, false);
    BumpAllocator rest(memory);
    float *const k_panels = rest.take(shape.kv_heads * plan.size), *const v_rows = rest.take(shape.kv_heads * plan.size);
    int64_t* const range = reinterpret_cast<int64_t*>(rest.take(share_floats(threads)));
    float* const scratch = rest.take(threads * each);
    lay_out(pool, plan, k, nullptr, k_panels);
    lay_out(pool, plan, v, v_rows, nullptr);
    share(plan, threads, range);
    pool.run(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = range[begin]; item < range[end]; ++item) {
            const Block block(plan, item);
            const Keys keys{nullptr, v_rows + block.kv_head * plan.size, k_panels + block.kv_head * plan.size, nullptr};
            BumpAllocator own(scratch + begin * each);
            EMBEDGRAD_DISPATCH(forward_block, plan, block, keys, q, out, lse, own)
        }
    });
}

template <typename T>
void tree_attention_backward(
    const Pool& pool, const TreeMask& mask, const int32_t* schedule, const TreeShape& shape, Heads<T> d_out, Heads<T> q,
    Heads<T> k, Heads<T> v, Heads<T> out, const float* lse, Heads<T> dq, Heads<T> dk, Heads<T> dv, float* memory) {
    const Plan plan(mask, schedule, shape);
    const int64_t threads = pool.threads(), each = block_floats(plan.most_rows(), plan.padded, true);
    const int64_t size = plan.size, kv_heads = shape.kv_heads;
    BumpAllocator rest(memory);
    float *const k_panels = rest.take(kv_heads * size), *const v_panels = rest.take(kv_heads * size);
    float* const k_rows = dq.data ? rest.take(kv_heads * size) : nullptr;
    int64_t* const range = reinterpret_cast<int64_t*>(rest.take(share_floats(threads)));
    int64_t* const first_part = range + threads + 1;
    float* const scratch = rest.take(threads * each);
    lay_out(pool, plan, k, k_rows, k_panels);
    lay_out(pool, plan, v, nullptr, v_panels);
    share(plan, threads, range);
    const Parts parts{range, first_part, threads, std::max<int64_t>(1, mask.blocks)};
    first_part[0] = 0;
    for (int64_t i = 0; i < threads; ++i) first_part[i + 1] = first_part[i] + parts.of(i);
    float* const sums = dk.data ? rest.take(first_part[threads] * 2 * size) : nullptr;
    pool.run(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* const own_sums = dk.data ? sums + first_part[i] * 2 * size : nullptr;
            if (dk.data) std::memset(own_sums, 0, sizeof(float) * 2 * size * parts.of(i));
            for (int64_t item = range[i]; item < range[i + 1]; ++item) {
                const Block block(plan, item);
                const int64_t at = block.kv_head * size;
                const Keys keys{k_rows ? k_rows + at : nullptr, nullptr, k_panels + at, v_panels + at};
                float* dk_sum = dk.data ? own_sums + (block.kv_head - parts.first_kv_head(i)) * 2 * size : nullptr;
                float* dv_sum = dk.data ? dk_sum + size : nullptr;
                BumpAllocator own(scratch + begin * each);
                EMBEDGRAD_DISPATCH(
                    backward_block, plan, block, keys, d_out, q, out, lse, dq, dk_sum, dv_sum, own)
            }
        }
    });
    if (!dk.data) return;
    pool.run(mask.keys - shape.prefix, 16, [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(add_parts, plan, parts, sums, dk, dv, begin, end)
    });
}

#define EMBEDGRAD_OF(T)                                                                                                \
    template void tree_attention(                                                                                      \
        const Pool&, const TreeMask&, const int32_t*, const TreeShape&, Heads<T>, Heads<T>, Heads<T>, Heads<T>, float*, \
        float*);                                                                                                       \
    template void tree_attention_backward(                                                                             \
        const Pool&, const TreeMask&, const int32_t*, const TreeShape&, Heads<T>, Heads<T>, Heads<T>, Heads<T>,         \
        Heads<T>, const float*, Heads<T>, Heads<T>, Heads<T>, float*);
EMBEDGRAD_OF(float)
EMBEDGRAD_OF(Bf16)

}  // namespace embedgrad

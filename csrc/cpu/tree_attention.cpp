#include "tree_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"

namespace embedgrad {
namespace {

constexpr size_t kChunk = 8;  // panels whose scores exist at once: they stay in the cache beside q and o

// The keys' intervals by panel. Keys beyond the last have an empty interval.
struct Panels {
    int64_t count, padded;  // padded: head dimension, rounded up to whole panels; the rest is zero
    std::vector<int32_t> begin, end, position;
    std::vector<int32_t> begin_low, begin_high, end_low, end_high, position_low, position_high;

    explicit Panels(const TreeShape& t)
        : count((t.keys + kPanel - 1) / kPanel), padded((t.head_dim + kPanel - 1) / kPanel * kPanel),
          begin(count * kPanel, std::numeric_limits<int32_t>::max()), end(count * kPanel, 0), position(count * kPanel, 0),
          begin_low(count), begin_high(count), end_low(count), end_high(count), position_low(count),
          position_high(count) {
        std::copy(t.key_begin, t.key_begin + t.keys, begin.begin());
        std::copy(t.key_end, t.key_end + t.keys, end.begin());
        if (t.key_position) std::copy(t.key_position, t.key_position + t.keys, position.begin());
        for (int64_t p = 0; p < count; ++p) {
            const auto bounds = [&](const std::vector<int32_t>& x, int64_t size, int32_t& low, int32_t& high) {
                const auto found = std::minmax_element(x.begin() + p * kPanel, x.begin() + p * kPanel + size);
                low = *found.first;
                high = *found.second;
            };
            bounds(begin, kPanel, begin_low[p], begin_high[p]);
            bounds(end, kPanel, end_low[p], end_high[p]);
            bounds(position, std::min(kPanel, t.keys - p * kPanel), position_low[p], position_high[p]);
        }
    }
};

struct Seen {
    int64_t panel;
    bool partly;  // some query of the block does not see some key of it
};

// Some query rows and the heads of one group over them: `rows` = queries · heads per group.
struct Block {
    int64_t group, first, queries, rows;
    std::vector<Seen> seen;
};

std::vector<Block> blocks_of(const TreeShape& t, const Panels& panels) {
    std::vector<Block> blocks;
    for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t first = t.block_start[b], stop = t.block_start[b + 1];
        Block block{0, first, stop - first, (stop - first) * (t.heads / t.groups), {}};
        const int32_t low = t.query_index[first], high = t.query_index[stop - 1];
        int32_t nearest = 0, farthest = 0;
        if (t.query_position) {
            const auto found = std::minmax_element(t.query_position + first, t.query_position + stop);
            nearest = *found.first;
            farthest = *found.second;
        }
        for (int64_t p = 0; p < panels.count; ++p) {
            if (panels.begin_low[p] > high || panels.end_high[p] <= low) continue;
            bool partly = panels.begin_high[p] > low || panels.end_low[p] <= high;
            if (t.query_position) {
                if (nearest - panels.position_high[p] >= t.window) continue;
                partly = partly || farthest - panels.position_low[p] >= t.window;
            }
            block.seen.push_back({p, partly});
        }
        blocks.push_back(std::move(block));
    }
    std::vector<Block> all;
    for (int64_t g = 0; g < t.groups; ++g)
        for (Block block : blocks) {
            block.group = g;
            all.push_back(std::move(block));
        }
    return all;
}

// Blocks [range[i], range[i + 1]) for thread i: contiguous, of about equal cost.
std::vector<size_t> shares(const std::vector<Block>& blocks, int64_t threads) {
    const auto cost = [](const Block& b) { return static_cast<double>(b.rows) * (b.seen.size() + 1); };
    double total = 0, sum = 0;
    for (const Block& b : blocks) total += cost(b);
    std::vector<size_t> range{0};
    for (size_t i = 0; i < blocks.size(); ++i) {
        const double middle = sum + cost(blocks[i]) / 2;
        while (static_cast<int64_t>(range.size()) < threads && middle > total * range.size() / threads) range.push_back(i);
        sum += cost(blocks[i]);
    }
    while (static_cast<int64_t>(range.size()) <= threads) range.push_back(blocks.size());
    return range;
}

// Aligned floats, not initialised.
class Buffer {
public:
    explicit Buffer(int64_t n) : data_(new (std::align_val_t(64)) float[n > 0 ? n : 1]) {}
    ~Buffer() { ::operator delete[](data_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* get() const { return data_; }

private:
    float* data_;
};

// One thread's memory for one block at a time.
class Scratch {
public:
    explicit Scratch(int64_t n) : buffer_(n) {}
    void clear() { used_ = 0; }
    float* take(int64_t n) {
        float* p = buffer_.get() + used_;
        used_ += (n + 15) / 16 * 16;
        return p;
    }
    static int64_t needed(const std::vector<Block>& blocks, int64_t padded) {
        int64_t rows = 0;
        for (const Block& b : blocks) rows = std::max(rows, b.rows);
        return rows * (3 * padded + 2 * static_cast<int64_t>(kChunk) * kPanel + 2) + 7 * 16;
    }

private:
    Buffer buffer_;
    int64_t used_ = 0;
};

// Keys and values of one group: rows [count · kPanel, padded] and panels [count, padded, kPanel]; null where unused.
struct Keys {
    const float *k_rows, *v_rows, *k_panels, *v_panels;
};

// Every group's rows and panels of k or v, laid out group by group.
void lay_out(const Pool& pool, const TreeShape& t, const Panels& panels, Heads x, float* rows, float* transposed) {
    const int64_t d = panels.padded, size = panels.count * kPanel * d;
    pool.run(t.groups * panels.count, 8, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t g = item / panels.count, p = item % panels.count;
            for (int64_t j = 0; j < kPanel; ++j) {
                const int64_t key = p * kPanel + j;
                const float* from = key < t.keys ? x.data + key * x.row + g * t.head_dim : nullptr;
                const int64_t filled = from ? t.head_dim : 0;
                if (rows) {
                    float* to = rows + g * size + key * d;
                    std::copy(from, from + filled, to);
                    std::fill(to + filled, to + d, 0.0f);
                }
                if (transposed) {
                    float* to = transposed + g * size + p * kPanel * d + j;
                    for (int64_t c = 0; c < filled; ++c) to[c * kPanel] = from[c];
                    for (int64_t c = filled; c < d; ++c) to[c * kPanel] = 0.0f;
                }
            }
        }
    });
}

// The block's rows of x, times `factor`, [rows, padded]: query by query, the group's heads together.
void gather(const TreeShape& t, const Block& block, Heads x, float factor, int64_t padded, float* to) {
    const int64_t group = t.heads / t.groups;
    for (int64_t r = 0; r < block.rows; ++r, to += padded) {
        const float* from = x.data + (block.first + r / group) * x.row + (block.group * group + r % group) * t.head_dim;
        for (int64_t c = 0; c < t.head_dim; ++c) to[c] = from[c] * factor;
        std::fill(to + t.head_dim, to + padded, 0.0f);
    }
}

}  // namespace

#define EMBEDGRAD_KERNELS "tree_attention.inl"
#include "per_isa.inl"

void tree_attention(const Pool& pool, const TreeShape& t, Heads q, Heads k, Heads v, Heads out, float* lse) {
    const Panels panels(t);
    const std::vector<Block> blocks = blocks_of(t, panels);
    const int64_t size = panels.count * kPanel * panels.padded;
    const Buffer laid(2 * t.groups * size);
    float *k_panels = laid.get(), *v_rows = k_panels + t.groups * size;
    lay_out(pool, t, panels, k, nullptr, k_panels);
    lay_out(pool, t, panels, v, v_rows, nullptr);
    const int64_t threads = pool.threads();
    const std::vector<size_t> range = shares(blocks, threads);
    pool.run(threads, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(Scratch::needed(blocks, panels.padded));
        for (size_t i = range[begin]; i < range[end]; ++i) {
            const int64_t at = blocks[i].group * size;
            const Keys keys{nullptr, v_rows + at, k_panels + at, nullptr};
            scratch.clear();
            EMBEDGRAD_DISPATCH(forward_block, t, panels, blocks[i], keys, q, out, lse, scratch)
        }
    });
}

void tree_attention_backward(
    const Pool& pool, const TreeShape& t, Heads d_out, Heads q, Heads k, Heads v, Heads out, const float* lse, Heads dq,
    Heads dk, Heads dv) {
    const Panels panels(t);
    const std::vector<Block> blocks = blocks_of(t, panels);
    const int64_t d = panels.padded, size = panels.count * kPanel * d;
    const Buffer laid((dq.data ? 3 : 2) * t.groups * size);
    float *k_panels = laid.get(), *v_panels = k_panels + t.groups * size;
    float* k_rows = dq.data ? v_panels + t.groups * size : nullptr;
    lay_out(pool, t, panels, k, k_rows, k_panels);
    lay_out(pool, t, panels, v, nullptr, v_panels);
    const int64_t threads = pool.threads();
    const std::vector<size_t> range = shares(blocks, threads);
    // A thread's blocks belong to neighbouring groups; each has a sum of its own for each of them, added in the order
    // of the threads, so that the same number of threads gives the same bits.
    struct Part {
        int64_t thread, group;
    };
    std::vector<Part> parts;
    std::vector<std::vector<int64_t>> part_of(threads, std::vector<int64_t>(t.groups, -1));
    if (dk.data)
        for (int64_t i = 0; i < threads; ++i)
            for (size_t b = range[i]; b < range[i + 1]; ++b)
                if (part_of[i][blocks[b].group] < 0) {
                    part_of[i][blocks[b].group] = static_cast<int64_t>(parts.size());
                    parts.push_back({i, blocks[b].group});
                }
    const Buffer sums(static_cast<int64_t>(parts.size()) * 2 * size);
    pool.run(threads, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(Scratch::needed(blocks, d));
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t part : part_of[i])
                if (part >= 0) std::memset(sums.get() + part * 2 * size, 0, sizeof(float) * 2 * size);
            for (size_t b = range[i]; b < range[i + 1]; ++b) {
                const int64_t at = blocks[b].group * size, part = part_of[i][blocks[b].group];
                const Keys keys{k_rows ? k_rows + at : nullptr, nullptr, k_panels + at, v_panels + at};
                float* dk_sum = dk.data ? sums.get() + part * 2 * size : nullptr;
                float* dv_sum = dk.data ? dk_sum + size : nullptr;
                scratch.clear();
                EMBEDGRAD_DISPATCH(
                    backward_block, t, panels, blocks[b], keys, d_out, q, out, lse, dq, dk_sum, dv_sum, scratch)
            }
        }
    });
    if (!dk.data) return;
    pool.run(t.keys - t.kept, 16, [&](int64_t begin, int64_t end) {
        for (int64_t key = begin; key < end; ++key)
            for (int64_t g = 0; g < t.groups; ++g) {
                float* to_k = dk.data + key * dk.row + g * t.head_dim;
                float* to_v = dv.data + key * dv.row + g * t.head_dim;
                std::fill(to_k, to_k + t.head_dim, 0.0f);
                std::fill(to_v, to_v + t.head_dim, 0.0f);
                for (size_t i = 0; i < parts.size(); ++i) {
                    if (parts[i].group != g) continue;
                    const float* from = sums.get() + static_cast<int64_t>(i) * 2 * size + (key + t.kept) * d;
                    for (int64_t c = 0; c < t.head_dim; ++c) to_k[c] += from[c], to_v[c] += from[size + c];
                }
            }
    });
}

}  // namespace embedgrad

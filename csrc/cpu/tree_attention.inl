// Blocks of tree attention for one instruction set; see tree_attention.h.

#include "gemm_microkernel.inl"

// Panels [begin, end) of k or v in float32, counted kv head by kv head: as `rows` and `transposed`, unless these are
// null.
template <typename T>
static void lay_out_panels(const Plan& plan, Heads<T> x, float* rows, float* transposed, int64_t begin, int64_t end) {
    const int64_t d = plan.padded, head_dim = plan.shape.head_dim;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t g = item / plan.panels, key = item % plan.panels * kPanel;
        const int64_t keys = std::min(kPanel, plan.mask.keys - key);
        const T* from = x.data + key * x.stride + g * head_dim;
        for (int64_t column = 0; column < d; column += kPanel) {
            alignas(64) float square[kPanel * kPanel] = {};
            for (int64_t j = 0; j < keys; ++j)
                for (int64_t c = 0; c < kPanel && column + c < head_dim; c += VL)
                    store(square + j * kPanel + c, load(from + j * x.stride + column + c, head_dim - column - c));
            if (rows)
                for (int64_t j = 0; j < kPanel; ++j)
                    __builtin_memcpy(
                        rows + g * plan.size + (key + j) * d + column, square + j * kPanel, sizeof(float) * kPanel);
            if (transposed)
                for (int64_t c = 0; c < kPanel; c += 4)
                    for (int64_t j = 0; j < kPanel; j += 4)
                        transpose_four(
                            square + j * kPanel + c, transposed + g * plan.size + key * d + (column + c) * kPanel + j);
        }
    }
}

// Queries ahead to prefetch. The heads of one kv head are a few cache lines per query, so the hardware prefetcher does
// not detect a stream.
constexpr int64_t kAhead = 4;

// The block's rows of x times `factor`, [rows + kSpareRows, padded]: query by query, head by head, then kSpareRows of
// 0.
template <typename T>
static void gather(const Plan& plan, const Block& block, Heads<T> x, float factor, float* to) {
    const int64_t per_kv_head = plan.heads_per_kv_head(), head_dim = plan.shape.head_dim, d = plan.padded;
    for (int64_t n = block.first; n < block.first + block.queries; ++n) {
        const T* from = x.data + n * x.stride + block.kv_head * per_kv_head * head_dim;
        if (n + kAhead < block.first + block.queries)
            prefetch(from + kAhead * x.stride, per_kv_head * head_dim * sizeof(T));
        for (int64_t h = 0; h < per_kv_head; ++h, from += head_dim, to += d)
            for (int64_t c = 0; c < d; c += VL)
                store(to + c, c < head_dim ? load(from + c, head_dim - c) * factor : Vec{});
    }
    std::memset(to, 0, sizeof(float) * kSpareRows * d);
}

// Sets the scores of the block's i-th panel to −inf where the query does not see the key; the scores of row r are at
// s + r · kChunk · kPanel.
static void hide(const Plan& plan, const Block& block, int64_t i, float* s) {
    constexpr int64_t s_stride = kChunk * kPanel;
    const TreeMask& mask = plan.mask;
    const Seen& seen = block.seen[i];
    const int64_t per_kv_head = plan.heads_per_kv_head();
    const Vec hidden = broadcast(-std::numeric_limits<float>::infinity());
    const auto hide_rows = [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r)
            for (int64_t j = 0; j < kPanel; j += VL) store(s + r * s_stride + j, hidden);
    };
    hide_rows(0, seen.from * per_kv_head);
    hide_rows(seen.to * per_kv_head, block.rows);
    if (!seen.partly) return;
    const int32_t *begin = plan.begin + seen.panel * kPanel, *end = plan.end + seen.panel * kPanel;
    s += seen.from * per_kv_head * s_stride;
    for (int64_t n = block.first + seen.from; n < block.first + seen.to; ++n) {
        const int32_t index = mask.query_index[n];
        float bias[kPanel];
        for (int64_t j = 0; j < kPanel; ++j)
            bias[j] = begin[j] <= index && index < end[j] ? 0.0f : -std::numeric_limits<float>::infinity();
        if (mask.query_position) {
            const int32_t* position = plan.position + seen.panel * kPanel;
            for (int64_t j = 0; j < kPanel; ++j)
                if (mask.query_position[n] - position[j] >= mask.window) bias[j] = -std::numeric_limits<float>::infinity();
        }
        for (int64_t h = 0; h < per_kv_head; ++h, s += s_stride)
            for (int64_t j = 0; j < kPanel; j += VL) store(s + j, load(s + j) + load(bias + j));
    }
}

// a [rows, d] times the block's panels [from, to); the products of row r are at s + r · kChunk · kPanel. Computed for
// the rows that see a panel, or the other panel of the same tile.
static void panel_products(
    const Plan& plan, const Block& block, const float* a, const float* panels, int64_t from, int64_t to, float* s) {
    const int64_t d = plan.padded, per_kv_head = plan.heads_per_kv_head(), panel_stride = kPanel * d;
    for (int64_t i = from; i < to;) {
        const int64_t last = std::min<int64_t>(to, i + kTilePanels) - 1;
        const int64_t first_row = std::min(block.seen[i].from, block.seen[last].from) * per_kv_head;
        const int64_t rows = std::max(block.seen[i].to, block.seen[last].to) * per_kv_head - first_row;
        const float *left = a + first_row * d, *right = panels + block.seen[i].panel * panel_stride;
        float* at = s + first_row * kChunk * kPanel + (i - from) * kPanel;
        const int64_t next = (block.seen[last].panel - block.seen[i].panel) * panel_stride;
        if (last > i)
            product<kTilePanels>(left, d, 1, right, kPanel, next, d, at, kChunk * kPanel, rows, false);
        else
            product<1>(left, d, 1, right, kPanel, 0, d, at, kChunk * kPanel, rows, false);
        i = last + 1;
    }
}

// The softcap, for the queries of each panel that see some key of it.
static void soften_panels(const Plan& plan, const Block& block, int64_t from, int64_t to, float* s) {
    for (int64_t i = from; i < to; ++i) {
        const int64_t per_kv_head = plan.heads_per_kv_head(), end = block.seen[i].to * per_kv_head;
        for (int64_t r = block.seen[i].from * per_kv_head; r < end; ++r)
            soften(s + r * kChunk * kPanel + (i - from) * kPanel, plan.shape.softcap, kPanel);
    }
}

// Scores of the block against its panels [from, to).
static void scores(
    const Plan& plan, const Block& block, const float* q, const float* k_panels, int64_t from, int64_t to, float* s) {
    panel_products(plan, block, q, k_panels, from, to, s);
    if (plan.shape.softcap) soften_panels(plan, block, from, to, s);
    for (int64_t i = from; i < to; ++i) hide(plan, block, i, s + (i - from) * kPanel);
}

// c [rows, d] += a [rows, keys of the block's panels [from, to)] · b [all keys, d].
static void add_products(
    const Plan& plan, const Block& block, const float* a, const float* b, int64_t from, int64_t to, float* c) {
    const int64_t d = plan.padded, per_kv_head = plan.heads_per_kv_head();
    for (int64_t i = from; i < to;) {
        int64_t end = i + 1;  // neighbouring panels that the same queries see become one longer sum
        while (end < to && block.seen[end].follows(block.seen[end - 1])) ++end;
        const int64_t row = block.seen[i].from * per_kv_head, rows = block.seen[i].to * per_kv_head - row;
        const float* left = a + row * kChunk * kPanel + (i - from) * kPanel;
        const float* right = b + block.seen[i].panel * kPanel * d;
        add_product_of_columns(left, kChunk * kPanel, 1, right, d, (end - i) * kPanel, c + row * d, d, rows, d);
        i = end;
    }
}

// Of the panels [from, to), those from the first to the last that a query sees, as places in its row of scores.
struct Span {
    int64_t from, to;
};

static inline Span span_of(const Block& block, int64_t query, int64_t from, int64_t to) {
    int64_t first = from, last = to;
    while (first < to && !block.seen[first].by(query)) ++first;
    while (last > first && !block.seen[last - 1].by(query)) --last;
    return {(first - from) * kPanel, (last - from) * kPanel};
}

static inline void clear_outside(float* row, Span span, int64_t width) {
    std::memset(row, 0, sizeof(float) * span.from);
    std::memset(row + span.to, 0, sizeof(float) * (width - span.to));
}

template <int N>
EMBEDGRAD_INLINE void exponentials_at(float* at, float top, Vec& mass) {
    Vec x[N], p[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = load(at + k * VL) - top;
    exp_below<N>(x, p);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        store(at + k * VL, p[k]);
        mass += p[k];
    }
}

// In place: exp(row − top) over the span; their sum is added to `mass`. Four vectors at a time hide the latency of exp.
EMBEDGRAD_INLINE void exponentials(float* row, Span span, float top, Vec& mass) {
    int64_t j = span.from;
    for (; j + 4 * VL <= span.to; j += 4 * VL) exponentials_at<4>(row + j, top, mass);
    for (; j < span.to; j += kPanel) exponentials_at<kPanelVectors>(row + j, top, mass);
}

// Stores a row of head_dim floats times `factor` as T.
template <typename T>
static inline void place(const float* from, float factor, T* to, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; c += VL) store(to + c, load(from + c) * factor, head_dim - c);
}

template <typename T>
static void forward_block(
    const Plan& plan, const Block& block, const Keys& keys, Heads<T> q, Heads<T> out, float* lse, BumpAllocator& memory) {
    const int64_t d = plan.padded, rows = block.rows, heads = plan.shape.heads, head_dim = plan.shape.head_dim;
    const int64_t per_kv_head = plan.heads_per_kv_head(), room = rows + kSpareRows, s_stride = kChunk * kPanel;
    float* qs = memory.take(room * d);
    float* o = memory.take(room * d);
    float* s = memory.take(room * s_stride);
    float* top = memory.take(rows);
    float* total = memory.take(rows);
    gather(plan, block, q, plan.shape.scale, qs);
    std::memset(o, 0, sizeof(float) * rows * d);
    std::memset(s + rows * s_stride, 0, sizeof(float) * kSpareRows * s_stride);
    for (int64_t r = 0; r < rows; ++r) top[r] = -std::numeric_limits<float>::infinity(), total[r] = 0;
    for (int64_t from = 0; from < block.count; from += kChunk) {
        const int64_t to = std::min(block.count, from + kChunk), width = (to - from) * kPanel;
        scores(plan, block, qs, keys.k_panels, from, to, s);
        for (int64_t r = 0; r < rows; ++r) {
            const Span span = span_of(block, r / per_kv_head, from, to);
            float* row = s + r * s_stride;
            Vec most = broadcast(-std::numeric_limits<float>::infinity());
            for (int64_t j = span.from; j < span.to; j += VL) most = max(most, load(row + j));
            const float before = top[r], now = std::max(before, highest(most));
            if (now == -std::numeric_limits<float>::infinity()) {  // no key seen yet; −inf − (−inf) would be NaN
                std::memset(row, 0, sizeof(float) * width);
                continue;
            }
            clear_outside(row, span, width);
            Vec mass = {};
            exponentials(row, span, now, mass);
            const float shrink = before == now ? 1.0f : std::exp(before - now);
            total[r] = total[r] * shrink + sum(mass);
            top[r] = now;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < d; c += VL) store(o + r * d + c, load(o + r * d + c) * shrink);
        }
        add_products(plan, block, s, keys.v_rows, from, to, o);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / per_kv_head, h = block.kv_head * per_kv_head + r % per_kv_head;
        lse[n * heads + h] = total[r] > 0 ? top[r] + std::log(total[r]) : -std::numeric_limits<float>::infinity();
        place(o + r * d, total[r] > 0 ? 1.0f / total[r] : 0.0f, out.data + n * out.stride + h * head_dim, head_dim);
    }
}

template <typename T>
static void backward_block(
    const Plan& plan, const Block& block, const Keys& keys, Heads<T> d_out, Heads<T> q, Heads<T> out, const float* lse,
    Heads<T> dq, float* dk_sum, float* dv_sum, BumpAllocator& memory) {
    const int64_t d = plan.padded, rows = block.rows, per_kv_head = plan.heads_per_kv_head();
    const int64_t heads = plan.shape.heads, head_dim = plan.shape.head_dim;
    const int64_t room = rows + kSpareRows, s_stride = kChunk * kPanel;
    float* qs = memory.take(room * d);
    float* d_o = memory.take(room * d);
    float* d_q = memory.take(room * d);
    float* p = memory.take(room * s_stride);
    float* ds = memory.take(room * s_stride);
    float* delta = memory.take(rows);
    float* normaliser = memory.take(rows);
    gather(plan, block, q, plan.shape.scale, qs);
    gather(plan, block, d_out, 1.0f, d_o);
    gather(plan, block, out, 1.0f, d_q);
    std::memset(p + rows * s_stride, 0, sizeof(float) * kSpareRows * s_stride);
    std::memset(ds + rows * s_stride, 0, sizeof(float) * kSpareRows * s_stride);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / per_kv_head, h = block.kv_head * per_kv_head + r % per_kv_head;
        Vec along = {};
        for (int64_t c = 0; c < d; c += VL) along += load(d_o + r * d + c) * load(d_q + r * d + c);
        delta[r] = sum(along);
        const float l = lse[n * heads + h];
        normaliser[r] = l == -std::numeric_limits<float>::infinity() ? -l : l;  // no key seen: +inf makes every p 0
    }
    std::memset(d_q, 0, sizeof(float) * rows * d);
    for (int64_t from = 0; from < block.count; from += kChunk) {
        const int64_t to = std::min(block.count, from + kChunk), width = (to - from) * kPanel;
        scores(plan, block, qs, keys.k_panels, from, to, p);
        panel_products(plan, block, d_o, keys.v_panels, from, to, ds);
        for (int64_t r = 0; r < rows; ++r) {
            const Span span = span_of(block, r / per_kv_head, from, to);
            float *p_row = p + r * s_stride, *ds_row = ds + r * s_stride;
            clear_outside(p_row, span, width);
            clear_outside(ds_row, span, width);
            const float softcap = plan.shape.softcap, minus = softcap ? 0.0f : delta[r];
            if (softcap)  // before the scores become weights; a hidden score's slope is of no weight
                for (int64_t j = span.from; j < span.to; j += VL)
                    store(ds_row + j, (load(ds_row + j) - delta[r]) * cap_slope(load(p_row + j), softcap));
            Vec unused = {};
            exponentials(p_row, span, normaliser[r], unused);
            for (int64_t j = span.from; j < span.to; j += VL) {
                const Vec seen = load(p_row + j);
                store(ds_row + j, seen == 0.0f ? Vec{} : seen * (load(ds_row + j) - minus));
            }
        }
        if (dv_sum)
            for (int64_t i = from; i < to; ++i) {
                const Seen& seen = block.seen[i];
                const int64_t row = seen.from * per_kv_head, depth = seen.to * per_kv_head - row;
                const int64_t at = row * s_stride + (i - from) * kPanel, key = seen.panel * kPanel * d;
                add_product_of_columns<kKeyTileRows>(
                    p + at, 1, s_stride, d_o + row * d, d, depth, dv_sum + key, d, kPanel, d);
                add_product_of_columns<kKeyTileRows>(
                    ds + at, 1, s_stride, qs + row * d, d, depth, dk_sum + key, d, kPanel, d);
            }
        if (dq.data) add_products(plan, block, ds, keys.k_rows, from, to, d_q);
    }
    if (dq.data)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t n = block.first + r / per_kv_head, h = block.kv_head * per_kv_head + r % per_kv_head;
            place(d_q + r * d, plan.shape.scale, dq.data + n * dq.stride + h * head_dim, head_dim);
        }
}

// dk and dv of the keys [begin, end), counted from the first key behind the prefix: the sum of the threads' parts.
template <typename T>
static void add_parts(
    const Plan& plan, const Parts& parts, const float* sums, Heads<T> dk, Heads<T> dv, int64_t begin, int64_t end) {
    const int64_t d = plan.padded, head_dim = plan.shape.head_dim;
    for (int64_t key = begin; key < end; ++key)
        for (int64_t g = 0; g < plan.shape.kv_heads; ++g)
            for (int64_t c = 0; c < head_dim; c += VL) {
                Vec k_sum = {}, v_sum = {};
                for (int64_t i = 0; i < parts.threads; ++i) {
                    const int64_t part = parts.part(i, g);
                    if (part < 0) continue;
                    const float* from = sums + part * 2 * plan.size + (key + plan.shape.prefix) * d + c;
                    k_sum += load(from);
                    v_sum += load(from + plan.size);
                }
                store(dk.data + key * dk.stride + g * head_dim + c, k_sum, head_dim - c);
                store(dv.data + key * dv.stride + g * head_dim + c, v_sum, head_dim - c);
            }
}

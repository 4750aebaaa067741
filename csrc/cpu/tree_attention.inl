// Blocks of tree attention for one instruction set; see tree_attention.h.

// C[m, :] (+)= Σ_k A[m, k] B[k, :] for ROWS rows and kPanel columns, A read at a + m·a_row + k·a_col. Accumulators
// stay in registers: ROWS · kPanel / VL of them.
template <int ROWS>
static inline void product_tile(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
    bool add) {
    constexpr int N = static_cast<int>(kPanel) / VL;
    Vec sums[ROWS][N];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_row + n * VL) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load(b + k * b_row + n * VL);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
            const Vec left = all(a[m * a_row + k * a_col]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] += left * row[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(c + m * c_row + n * VL, sums[m][n]);
}

// The same for any number of rows.
static void product(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
    int64_t rows, bool add) {
    constexpr int MOST = VL == 16 ? 12 : VL == 8 ? 6 : 3;
    int64_t m = 0;
    for (; m + MOST <= rows; m += MOST)
        product_tile<MOST>(a + m * a_row, a_row, a_col, b, b_row, depth, c + m * c_row, c_row, add);
    if (VL == 16)
        for (; m + 4 <= rows; m += 4)
            product_tile<4>(a + m * a_row, a_row, a_col, b, b_row, depth, c + m * c_row, c_row, add);
    if (VL == 8 && m + 3 <= rows) {
        product_tile<3>(a + m * a_row, a_row, a_col, b, b_row, depth, c + m * c_row, c_row, add);
        m += 3;
    }
    for (; m < rows; ++m)
        product_tile<1>(a + m * a_row, a_row, a_col, b, b_row, depth, c + m * c_row, c_row, add);
}

// −inf where the query does not see the key; scores [queries · group, kPanel] at `s`.
static void hide(
    const TreeShape& t, const Panels& panels, int64_t panel, int64_t first, int64_t queries, float* s, int64_t s_row) {
    const int64_t group = t.heads / t.groups;
    const int32_t* begin = panels.begin.data() + panel * kPanel;
    const int32_t* end = panels.end.data() + panel * kPanel;
    for (int64_t n = 0; n < queries; ++n) {
        const int32_t i = t.query_index[first + n];
        float bias[kPanel];
        for (int64_t j = 0; j < kPanel; ++j)
            bias[j] = begin[j] <= i && i < end[j] ? 0.0f : -std::numeric_limits<float>::infinity();
        if (t.query_position) {
            const int32_t* position = panels.position.data() + panel * kPanel;
            for (int64_t j = 0; j < kPanel; ++j)
                if (t.query_position[first + n] - position[j] >= t.window) bias[j] = -std::numeric_limits<float>::infinity();
        }
        for (int64_t h = 0; h < group; ++h, s += s_row)
            for (int64_t j = 0; j < kPanel; j += VL) store(s + j, load(s + j) + load(bias + j));
    }
}

// Scores of one block against the panels [from, to) of `seen`, [rows, (to − from)·kPanel].
static void scores(
    const TreeShape& t, const Panels& panels, const Block& block, const float* q, const float* k_panels, size_t from,
    size_t to, float* s) {
    const int64_t width = static_cast<int64_t>(to - from) * kPanel, d = panels.padded;
    for (size_t p = from; p < to; ++p) {
        const int64_t panel = block.seen[p].panel;
        float* at = s + static_cast<int64_t>(p - from) * kPanel;
        product(q, d, 1, k_panels + panel * kPanel * d, kPanel, d, at, width, block.rows, false);
        if (block.seen[p].partly) hide(t, panels, panel, block.first, block.queries, at, width);
    }
}

// c [rows, d] += a [rows, keys of the panels from..to] · b, whose rows of d elements stand at the keys' own numbers.
static void add_products(
    const Block& block, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t d, size_t from, size_t to,
    float* c, int64_t rows) {
    for (size_t i = from; i < to;) {
        size_t end = i + 1;  // panels that follow each other are one longer sum
        while (end < to && block.seen[end].panel == block.seen[end - 1].panel + 1) ++end;
        const float* left = a + static_cast<int64_t>(i - from) * kPanel;
        const float* right = b + block.seen[i].panel * kPanel * d;
        for (int64_t column = 0; column < d; column += kPanel)
            product(left, a_row, a_col, right + column, d, static_cast<int64_t>(end - i) * kPanel, c + column, d, rows, true);
        i = end;
    }
}

static void forward_block(
    const TreeShape& t, const Panels& panels, const Block& block, const Keys& keys, Heads q, Heads out, float* lse,
    Scratch& scratch) {
    const int64_t d = panels.padded, rows = block.rows;
    float* qs = scratch.take(rows * d);
    float* o = scratch.take(rows * d);
    float* s = scratch.take(rows * kChunk * kPanel);
    float* top = scratch.take(rows);
    float* total = scratch.take(rows);
    gather(t, block, q, t.scale, d, qs);
    std::memset(o, 0, sizeof(float) * rows * d);
    for (int64_t r = 0; r < rows; ++r) top[r] = -std::numeric_limits<float>::infinity(), total[r] = 0;
    for (size_t from = 0; from < block.seen.size(); from += kChunk) {
        const size_t to = std::min(block.seen.size(), from + kChunk);
        const int64_t width = static_cast<int64_t>(to - from) * kPanel;
        scores(t, panels, block, qs, keys.k_panels, from, to, s);
        for (int64_t r = 0; r < rows; ++r) {
            float* row = s + r * width;
            Vec most = load(row);
            for (int64_t j = VL; j < width; j += VL) most = max(most, load(row + j));
            const float before = top[r], now = std::max(before, highest(most));
            if (now == -std::numeric_limits<float>::infinity()) {  // nothing seen yet: −inf − (−inf) would be NaN
                std::memset(row, 0, sizeof(float) * width);
                continue;
            }
            Vec mass = {};
            for (int64_t j = 0; j < width; j += VL) {
                const Vec p = exp(load(row + j) - now);
                store(row + j, p);
                mass += p;
            }
            const float shrink = before == now ? 1.0f : std::exp(before - now);
            total[r] = total[r] * shrink + sum(mass);
            top[r] = now;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < d; c += VL) store(o + r * d + c, load(o + r * d + c) * shrink);
        }
        add_products(block, s, width, 1, keys.v_rows, d, from, to, o, rows);
    }
    const int64_t group = t.heads / t.groups;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / group, h = block.group * group + r % group;
        lse[n * t.heads + h] = total[r] > 0 ? top[r] + std::log(total[r]) : -std::numeric_limits<float>::infinity();
        const float inverse = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        float* to = out.data + n * out.row + h * t.head_dim;
        for (int64_t c = 0; c < t.head_dim; ++c) to[c] = o[r * d + c] * inverse;
    }
}

static void backward_block(
    const TreeShape& t, const Panels& panels, const Block& block, const Keys& keys, Heads d_out, Heads q, Heads out,
    const float* lse, Heads dq, float* dk_sum, float* dv_sum, Scratch& scratch) {
    const int64_t d = panels.padded, rows = block.rows, group = t.heads / t.groups;
    float* qs = scratch.take(rows * d);
    float* d_o = scratch.take(rows * d);
    float* d_q = scratch.take(rows * d);
    float* p = scratch.take(rows * kChunk * kPanel);
    float* ds = scratch.take(rows * kChunk * kPanel);
    float* delta = scratch.take(rows);
    float* normaliser = scratch.take(rows);
    gather(t, block, q, t.scale, d, qs);
    gather(t, block, d_out, 1.0f, d, d_o);
    gather(t, block, out, 1.0f, d, d_q);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / group, h = block.group * group + r % group;
        Vec along = {};
        for (int64_t c = 0; c < d; c += VL) along += load(d_o + r * d + c) * load(d_q + r * d + c);
        delta[r] = sum(along);
        const float l = lse[n * t.heads + h];
        normaliser[r] = l == -std::numeric_limits<float>::infinity() ? -l : l;  // +inf: every p is 0
    }
    std::memset(d_q, 0, sizeof(float) * rows * d);
    for (size_t from = 0; from < block.seen.size(); from += kChunk) {
        const size_t to = std::min(block.seen.size(), from + kChunk);
        const int64_t width = static_cast<int64_t>(to - from) * kPanel;
        scores(t, panels, block, qs, keys.k_panels, from, to, p);
        for (size_t i = from; i < to; ++i)
            product(
                d_o, d, 1, keys.v_panels + block.seen[i].panel * kPanel * d, kPanel, d,
                ds + static_cast<int64_t>(i - from) * kPanel, width, rows, false);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = r * width; j < (r + 1) * width; j += VL) {
                const Vec share = exp(load(p + j) - normaliser[r]);
                store(p + j, share);
                store(ds + j, share * (load(ds + j) - delta[r]));
            }
        if (dv_sum)
            for (size_t i = from; i < to; ++i) {
                const int64_t key = block.seen[i].panel * kPanel, at = static_cast<int64_t>(i - from) * kPanel;
                for (int64_t c = 0; c < d; c += kPanel) {
                    product(p + at, 1, width, d_o + c, d, rows, dv_sum + key * d + c, d, kPanel, true);
                    product(ds + at, 1, width, qs + c, d, rows, dk_sum + key * d + c, d, kPanel, true);
                }
            }
        if (dq.data) add_products(block, ds, width, 1, keys.k_rows, d, from, to, d_q, rows);
    }
    if (dq.data)
        for (int64_t r = 0; r < rows; ++r) {
            float* at = dq.data + (block.first + r / group) * dq.row + (block.group * group + r % group) * t.head_dim;
            for (int64_t c = 0; c < t.head_dim; ++c) at[c] = d_q[r * d + c] * t.scale;
        }
}

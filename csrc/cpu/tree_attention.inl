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
static void hide(const Plan& plan, const Block& block, int64_t panel, float* s, int64_t s_row) {
    const TreeMask& mask = plan.mask;
    const int64_t group = plan.heads_per_group();
    const int32_t *begin = plan.begin + panel * kPanel, *end = plan.end + panel * kPanel;
    for (int64_t n = block.first; n < block.first + block.queries; ++n) {
        const int32_t i = mask.query_index[n];
        float bias[kPanel];
        for (int64_t j = 0; j < kPanel; ++j)
            bias[j] = begin[j] <= i && i < end[j] ? 0.0f : -std::numeric_limits<float>::infinity();
        if (mask.query_position) {
            const int32_t* position = plan.position + panel * kPanel;
            for (int64_t j = 0; j < kPanel; ++j)
                if (mask.query_position[n] - position[j] >= mask.window) bias[j] = -std::numeric_limits<float>::infinity();
        }
        for (int64_t h = 0; h < group; ++h, s += s_row)
            for (int64_t j = 0; j < kPanel; j += VL) store(s + j, load(s + j) + load(bias + j));
    }
}

// Scores of one block against the panels [from, to) of those it sees, [rows, (to − from)·kPanel].
static void scores(
    const Plan& plan, const Block& block, const float* q, const float* k_panels, int64_t from, int64_t to, float* s) {
    const int64_t width = (to - from) * kPanel, d = plan.padded;
    for (int64_t p = from; p < to; ++p) {
        float* at = s + (p - from) * kPanel;
        product(q, d, 1, k_panels + block.panel(p) * kPanel * d, kPanel, d, at, width, block.rows, false);
        if (block.partly(p)) hide(plan, block, block.panel(p), at, width);
    }
}

// c [rows, d] += a [rows, keys of the panels from..to] · b, whose rows of d elements stand at the keys' own numbers.
static void add_products(
    const Block& block, const float* a, int64_t a_row, const float* b, int64_t d, int64_t from, int64_t to, float* c) {
    for (int64_t i = from; i < to;) {
        int64_t end = i + 1;  // panels that follow each other are one longer sum
        while (end < to && block.panel(end) == block.panel(end - 1) + 1) ++end;
        const float* left = a + (i - from) * kPanel;
        const float* right = b + block.panel(i) * kPanel * d;
        for (int64_t column = 0; column < d; column += kPanel)
            product(left, a_row, 1, right + column, d, (end - i) * kPanel, c + column, d, block.rows, true);
        i = end;
    }
}

constexpr int kTogether = static_cast<int>(kPanel) / VL;  // vectors of a panel's row, whose exponentials run side by side

// row ← exp(row − top), their sum added to `mass`.
EMBEDGRAD_INLINE void exponentials(float* row, int64_t width, float top, Vec& mass) {
    for (int64_t j = 0; j < width; j += kPanel) {
        Vec x[kTogether], p[kTogether];
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) x[k] = load(row + j + k * VL) - top;
        exp_below<kTogether>(x, p);
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) {
            store(row + j + k * VL, p[k]);
            mass += p[k];
        }
    }
}

// One row of o, times `factor`, to a row of T.
template <typename T>
static inline void place(const float* from, float factor, T* to, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; c += VL) store(to + c, load(from + c) * factor, head_dim - c);
}

template <typename T>
static void forward_block(
    const Plan& plan, const Block& block, const Keys& keys, Heads<T> q, Heads<T> out, float* lse, Memory& memory) {
    const int64_t d = plan.padded, rows = block.rows, heads = plan.shape.heads, head_dim = plan.shape.head_dim;
    float* qs = memory.take(rows * d);
    float* o = memory.take(rows * d);
    float* s = memory.take(rows * kChunk * kPanel);
    float* top = memory.take(rows);
    float* total = memory.take(rows);
    gather(plan, block, q, plan.shape.scale, qs);
    std::memset(o, 0, sizeof(float) * rows * d);
    for (int64_t r = 0; r < rows; ++r) top[r] = -std::numeric_limits<float>::infinity(), total[r] = 0;
    for (int64_t from = 0; from < block.count; from += kChunk) {
        const int64_t to = std::min(block.count, from + kChunk), width = (to - from) * kPanel;
        scores(plan, block, qs, keys.k_panels, from, to, s);
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
            exponentials(row, width, now, mass);
            const float shrink = before == now ? 1.0f : std::exp(before - now);
            total[r] = total[r] * shrink + sum(mass);
            top[r] = now;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < d; c += VL) store(o + r * d + c, load(o + r * d + c) * shrink);
        }
        add_products(block, s, width, keys.v_rows, d, from, to, o);
    }
    const int64_t group = plan.heads_per_group();
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / group, h = block.group * group + r % group;
        lse[n * heads + h] = total[r] > 0 ? top[r] + std::log(total[r]) : -std::numeric_limits<float>::infinity();
        place(o + r * d, total[r] > 0 ? 1.0f / total[r] : 0.0f, out.data + n * out.row + h * head_dim, head_dim);
    }
}

template <typename T>
static void backward_block(
    const Plan& plan, const Block& block, const Keys& keys, Heads<T> d_out, Heads<T> q, Heads<T> out, const float* lse,
    Heads<T> dq, float* dk_sum, float* dv_sum, Memory& memory) {
    const int64_t d = plan.padded, rows = block.rows, group = plan.heads_per_group();
    const int64_t heads = plan.shape.heads, head_dim = plan.shape.head_dim;
    float* qs = memory.take(rows * d);
    float* d_o = memory.take(rows * d);
    float* d_q = memory.take(rows * d);
    float* p = memory.take(rows * kChunk * kPanel);
    float* ds = memory.take(rows * kChunk * kPanel);
    float* delta = memory.take(rows);
    float* normaliser = memory.take(rows);
    gather(plan, block, q, plan.shape.scale, qs);
    gather(plan, block, d_out, 1.0f, d_o);
    gather(plan, block, out, 1.0f, d_q);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = block.first + r / group, h = block.group * group + r % group;
        Vec along = {};
        for (int64_t c = 0; c < d; c += VL) along += load(d_o + r * d + c) * load(d_q + r * d + c);
        delta[r] = sum(along);
        const float l = lse[n * heads + h];
        normaliser[r] = l == -std::numeric_limits<float>::infinity() ? -l : l;  // +inf: every p is 0
    }
    std::memset(d_q, 0, sizeof(float) * rows * d);
    for (int64_t from = 0; from < block.count; from += kChunk) {
        const int64_t to = std::min(block.count, from + kChunk), width = (to - from) * kPanel;
        scores(plan, block, qs, keys.k_panels, from, to, p);
        for (int64_t i = from; i < to; ++i)
            product(
                d_o, d, 1, keys.v_panels + block.panel(i) * kPanel * d, kPanel, d, ds + (i - from) * kPanel, width, rows,
                false);
        for (int64_t r = 0; r < rows; ++r) {
            Vec unused = {};
            exponentials(p + r * width, width, normaliser[r], unused);
            for (int64_t j = r * width; j < (r + 1) * width; j += VL) store(ds + j, load(p + j) * (load(ds + j) - delta[r]));
        }
        if (dv_sum)
            for (int64_t i = from; i < to; ++i) {
                const int64_t key = block.panel(i) * kPanel, at = (i - from) * kPanel;
                for (int64_t c = 0; c < d; c += kPanel) {
                    product(p + at, 1, width, d_o + c, d, rows, dv_sum + key * d + c, d, kPanel, true);
                    product(ds + at, 1, width, qs + c, d, rows, dk_sum + key * d + c, d, kPanel, true);
                }
            }
        if (dq.data) add_products(block, ds, width, keys.k_rows, d, from, to, d_q);
    }
    if (dq.data)
        for (int64_t r = 0; r < rows; ++r) {
            T* at = dq.data + (block.first + r / group) * dq.row + (block.group * group + r % group) * head_dim;
            place(d_q + r * d, plan.shape.scale, at, head_dim);
        }
}

// The gradients of the keys [begin, end), counted from the first that has one: the sum of the threads' parts.
template <typename T>
static void add_parts(
    const Plan& plan, const Parts& parts, const float* sums, Heads<T> dk, Heads<T> dv, int64_t begin, int64_t end) {
    const int64_t d = plan.padded, head_dim = plan.shape.head_dim;
    for (int64_t key = begin; key < end; ++key)
        for (int64_t g = 0; g < plan.shape.groups; ++g)
            for (int64_t c = 0; c < head_dim; c += VL) {
                Vec k_sum = {}, v_sum = {};
                for (int64_t i = 0; i < parts.threads; ++i) {
                    const int64_t part = parts.part(i, g);
                    if (part < 0) continue;
                    const float* from = sums + part * 2 * plan.size + (key + plan.shape.kept) * d + c;
                    k_sum += load(from);
                    v_sum += load(from + plan.size);
                }
                store(dk.data + key * dk.row + g * head_dim + c, k_sum, head_dim - c);
                store(dv.data + key * dv.row + g * head_dim + c, v_sum, head_dim - c);
            }
}

// Products of blocks of float32 numbers that stay in registers, for one instruction set; written for tree attention.

typedef float Four __attribute__((vector_size(16)));

// to[4 × 4], rows kPanel apart = the transpose of from, whose rows are kPanel apart, too.
EMBEDGRAD_INLINE void transpose_four(const float* from, float* to) {
    Four x[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&x[i], from + i * kPanel, sizeof(Four));
    const Four a = {x[0][0], x[1][0], x[0][1], x[1][1]}, b = {x[2][0], x[3][0], x[2][1], x[3][1]};
    const Four c = {x[0][2], x[1][2], x[0][3], x[1][3]}, d = {x[2][2], x[3][2], x[2][3], x[3][3]};
    const Four out[4] = {{a[0], a[1], b[0], b[1]}, {a[2], a[3], b[2], b[3]}, {c[0], c[1], d[0], d[1]}, {c[2], c[3], d[2], d[3]}};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * kPanel, &out[i], sizeof(Four));
}

constexpr int kTogether = static_cast<int>(kPanel) / VL;   // vectors of a panel's row
constexpr int kWide = VL == 16 ? 2 : 1;                     // panels that a tile takes beside each other
constexpr int kTallest = VL == 16 ? 12 : VL == 8 ? 6 : 2;  // rows of a tile: its sums fill the registers
constexpr int kTallestOfKeys = VL == 16 ? 8 : kTallest;     // where the rows are a panel's keys

// C[m, :] (+)= Σ_k A[m, k] B[k, :] for ROWS rows and PANELS panels of columns, A read at a + m·a_row + k·a_col, panels of
// B `b_next` apart, those of C beside each other. Accumulators stay in registers: ROWS · PANELS · kPanel / VL of them.
template <int ROWS, int PANELS>
static inline void product_tile(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t b_next, int64_t depth, float* c,
    int64_t c_row, bool add) {
    constexpr int N = PANELS * kTogether;
    Vec sums[ROWS][N];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_row + n * VL) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load(b + k * b_row + n / kTogether * b_next + n % kTogether * VL);
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

// The same for any number of rows, TALLEST at a time; A and C have kSpareRows more than `rows`, so that four always fit.
template <int PANELS, int TALLEST = kTallest>
static void product(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t b_next, int64_t depth, float* c,
    int64_t c_row, int64_t rows, bool add) {
    static_assert(kSpareRows == 3);
    int64_t m = 0;
    const auto tile = [&](auto rows_of_it) {
        constexpr int ROWS = decltype(rows_of_it)::value;
        product_tile<ROWS, PANELS>(a + m * a_row, a_row, a_col, b, b_row, b_next, depth, c + m * c_row, c_row, add);
        m += ROWS;
    };
    while (rows - m >= TALLEST) tile(std::integral_constant<int, TALLEST>{});
    if (TALLEST > 8 && rows - m > 4) tile(std::integral_constant<int, 8>{});
    if (TALLEST > 4 && rows - m > 2) tile(std::integral_constant<int, 4>{});
    while (rows - m > 0) tile(std::integral_constant<int, (TALLEST > 8 ? 4 : 2)>{});
}

// For `width` columns of B, a multiple of kPanel: panels of it stand beside each other.
template <int TALLEST = kTallest>
static void product_of_columns(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
    int64_t rows, int64_t width) {
    int64_t at = 0;
    for (; at + kWide * kPanel <= width; at += kWide * kPanel)
        product<kWide, TALLEST>(a, a_row, a_col, b + at, b_row, kPanel, depth, c + at, c_row, rows, true);
    if (at < width) product<1, TALLEST>(a, a_row, a_col, b + at, b_row, 0, depth, c + at, c_row, rows, true);
}

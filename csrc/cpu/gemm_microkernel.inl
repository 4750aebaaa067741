// Products of float32 blocks whose accumulators stay in registers, for one instruction set; written for tree attention.

typedef float Four __attribute__((vector_size(16)));

// `to` [4, 4] = the transpose of `from` [4, 4]; the rows of both are kPanel apart.
EMBEDGRAD_INLINE void transpose_four(const float* from, float* to) {
    Four x[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&x[i], from + i * kPanel, sizeof(Four));
    const Four a = {x[0][0], x[1][0], x[0][1], x[1][1]}, b = {x[2][0], x[3][0], x[2][1], x[3][1]};
    const Four c = {x[0][2], x[1][2], x[0][3], x[1][3]}, d = {x[2][2], x[3][2], x[2][3], x[3][3]};
    const Four out[4] = {
        {a[0], a[1], b[0], b[1]}, {a[2], a[3], b[2], b[3]}, {c[0], c[1], d[0], d[1]}, {c[2], c[3], d[2], d[3]}};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * kPanel, &out[i], sizeof(Four));
}

constexpr int kPanelVectors = static_cast<int>(kPanel) / VL;  // vectors of kPanel floats
constexpr int kTilePanels = VL == 16 ? 2 : 1;                  // panels of a tile, side by side
constexpr int kTileRows = VL == 16 ? 12 : VL == 8 ? 6 : 2;     // rows of a tile whose accumulators fill the registers
constexpr int kKeyTileRows = VL == 16 ? 8 : kTileRows;         // the same where the rows are the kPanel keys of a panel

// C[m, :] (+)= Σ_k A[m, k] B[k, :] for a tile of ROWS rows and PANELS panels of columns. The panels of B are
// `b_panel_stride` apart, those of C side by side. The tile takes ROWS · PANELS · kPanel / VL accumulators.
template <int ROWS, int PANELS>
static inline void product_tile(
    const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b, int64_t b_row_stride,
    int64_t b_panel_stride, int64_t depth, float* c, int64_t c_row_stride, bool add) {
    constexpr int N = PANELS * kPanelVectors;
    Vec sums[ROWS][N];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_row_stride + n * VL) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            row[n] = load(b + k * b_row_stride + n / kPanelVectors * b_panel_stride + n % kPanelVectors * VL);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
            const Vec left = broadcast(a[m * a_row_stride + k * a_column_stride]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] += left * row[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(c + m * c_row_stride + n * VL, sums[m][n]);
}

// The same for any number of rows, TALLEST at a time. A and C have kSpareRows rows behind the last one, so that the
// last tile may have up to 4 rows.
template <int PANELS, int TALLEST = kTileRows>
static void product(
    const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b, int64_t b_row_stride,
    int64_t b_panel_stride, int64_t depth, float* c, int64_t c_row_stride, int64_t rows, bool add) {
    static_assert(kSpareRows == 3);
    int64_t m = 0;
    const auto tile = [&](auto rows_of_it) {
        constexpr int ROWS = decltype(rows_of_it)::value;
        product_tile<ROWS, PANELS>(
            a + m * a_row_stride, a_row_stride, a_column_stride, b, b_row_stride, b_panel_stride, depth,
            c + m * c_row_stride, c_row_stride, add);
        m += ROWS;
    };
    while (rows - m >= TALLEST) tile(std::integral_constant<int, TALLEST>{});
    if (TALLEST > 8 && rows - m > 4) tile(std::integral_constant<int, 8>{});
    if (TALLEST > 4 && rows - m > 2) tile(std::integral_constant<int, 4>{});
    while (rows - m > 0) tile(std::integral_constant<int, (TALLEST > 8 ? 4 : 2)>{});
}

// C += A B for `width` columns of B, a multiple of kPanel, whose panels are side by side.
template <int TALLEST = kTileRows>
static void add_product_of_columns(
    const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b, int64_t b_row_stride, int64_t depth,
    float* c, int64_t c_row_stride, int64_t rows, int64_t width) {
    int64_t at = 0;
    for (; at + kTilePanels * kPanel <= width; at += kTilePanels * kPanel)
        product<kTilePanels, TALLEST>(
            a, a_row_stride, a_column_stride, b + at, b_row_stride, kPanel, depth, c + at, c_row_stride, rows, true);
    if (at < width)
        product<1, TALLEST>(
            a, a_row_stride, a_column_stride, b + at, b_row_stride, 0, depth, c + at, c_row_stride, rows, true);
}

#include "prompt_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"

namespace embedgrad {
namespace {

// e = (e·û) û + b v. These are shares b / ‖e‖.
constexpr double kParallel = 1e-14;  // below it b v is a rounding error of float64
constexpr double kSlanted = 1e-2;    // above it b² = ‖e‖² − (e·û)² is accurate to 1e-11

struct Lengths {
    double ee, ea, aa;  // ‖e‖², e·e0, ‖e0‖²
    bool finite_moments;
};

// v = ((e − along û − first û) · scale − second û) · rescale. The difference of nearly parallel vectors is not
// orthogonal to û within rounding, so it is made orthogonal a second time, and a third time at unit length.
struct Across {
    double unit, along, first, scale, second, rescale;  // unit: 1/‖e0‖
};

}  // namespace

#define EMBEDGRAD_KERNELS "prompt_step.inl"
#include "per_isa.inl"

namespace {

// A row of the prompt and its anchor, whose length is not 0. Moving the row updates its `lengths`.
class PromptRow {
public:
    PromptRow(float* e, const float* anchor, int64_t d, Lengths& lengths)
        : e_(e), anchor_(anchor), d_(d), lengths_(lengths), length(std::sqrt(lengths.ee)),
          anchor_length(std::sqrt(lengths.aa)), along(lengths.ea / anchor_length) {}

    // b = ‖e − (e·û) û‖, 0 where that is a rounding error. Call it before `turn`.
    double split() {
        const double difference = length * length - along * along;
        slanted_ = difference > kSlanted * kSlanted * length * length;
        if (slanted_) return across_length_ = std::sqrt(difference);
        across_ = {1 / anchor_length, along, 0, 1, 0, 1};
        double squared = 0, ignored = 0;
        sums(across_.first, squared);
        const double first = across_.first;
        sums(ignored, squared);
        across_.first = first;
        const double b = std::sqrt(squared);
        parallel_ = b <= kParallel * length;
        if (parallel_) return 0;
        across_.scale = 1 / b;
        sums(across_.second, squared);
        const double second = across_.second;
        sums(ignored, squared);
        across_.second = second;
        across_.rescale = 1 / std::sqrt(squared);
        return b;
    }

    // Whether there is a v; with d = 1 there may be none.
    bool has_plane() const { return !(parallel_ && d_ == 1); }

    void scale(double by, bool& moved) { place(by, 0, 0, moved); }
    void onto_anchor(double by, bool& moved) { place(0, by, 0, moved); }

    // The row becomes x û + y v. Where e is parallel to û, v comes from the coordinate axis in which û is smallest.
    void turn(double x, double y, bool& moved) {
        if (slanted_) {  // here v = (e − along û) / b is accurate enough
            const double by = y / across_length_;
            return place(by, (x - by * along) / anchor_length, 0, moved);
        }
        if (!parallel_) return place(0, x / anchor_length, y, moved);
        int64_t axis = 0;
        for (int64_t i = 1; i < d_; ++i)
            if (std::abs(anchor_[i]) < std::abs(anchor_[axis])) axis = i;
        const double share = anchor_[axis] / anchor_length;
        const auto part = [&](int64_t i) { return (i == axis ? 1.0 : 0.0) - share * (anchor_[i] / anchor_length); };
        double squared = 0;
        for (int64_t i = 0; i < d_; ++i) squared += part(i) * part(i);
        const double by = d_ > 1 && squared > 0 ? y / std::sqrt(squared) : 0;
        for (int64_t i = 0; i < d_; ++i) {
            const float after = static_cast<float>(x * (anchor_[i] / anchor_length) + by * part(i));
            moved = moved || after != e_[i];
            e_[i] = after;
        }
        EMBEDGRAD_DISPATCH(measure, e_, anchor_, d_, lengths_)
    }

private:
    void sums(double& along_unit, double& squared) {
        EMBEDGRAD_DISPATCH(across_sums, e_, anchor_, d_, across_, along_unit, squared)
    }
    void place(double of_row, double of_anchor, double of_across, bool& moved) {
        EMBEDGRAD_DISPATCH(place_row, e_, anchor_, d_, of_row, of_anchor, of_across, across_, moved, lengths_)
    }

    float* e_;
    const float* anchor_;
    int64_t d_;
    Lengths& lengths_;
    Across across_ = {};
    double across_length_ = 0;
    bool parallel_ = false, slanted_ = false;

public:
    const double length, anchor_length, along;
};

// Projects into the cone, then into the band of norms; see CosineCone in embedgrad/maths/trust_region.py.
void project_cosine(const TrustRegion& region, PromptRow& row, bool& moved) {
    bool inside = row.along >= region.inside * row.length;
    double length = row.length, kappa = 0;
    if (!inside) {
        const double b = row.split();
        inside = region.close > 0 && row.along > 0 && b <= region.close * row.length;
        kappa = row.along * region.edge_cosine + b * region.edge_sine;
        if (!inside) length = kappa > 0 && (row.has_plane() || region.tau >= 0) ? kappa : 0;
    }
    double band = 1;
    if (region.norm_max >= 0) {
        const double ceiling = region.norm_max * row.anchor_length;
        if (length > ceiling * (1 + region.tolerance)) band = ceiling / length, length = ceiling;
    }
    if (region.norm_min >= 0) {
        const double floor = region.norm_min * row.anchor_length;
        if (length < floor * (1 - region.tolerance)) {
            if (length == 0) return row.onto_anchor(region.norm_min, moved);
            band *= floor / length;
        }
    }
    if (inside) {
        if (band != 1) row.scale(band, moved);
    } else if (length == 0) {
        row.scale(0, moved);
    } else {
        row.turn(band * kappa * region.edge_cosine, band * kappa * region.edge_sine, moved);
    }
}

void project_ball(const TrustRegion& region, float* e, const float* anchor, int64_t d, Lengths& lengths, bool& moved) {
    double squared = 0;
    EMBEDGRAD_DISPATCH(distance, e, anchor, d, squared)
    const double length = std::sqrt(lengths.aa), far = std::sqrt(squared);
    const double radius = region.relative ? region.radius * length : region.radius;
    // The tolerance is a share of e's length, because e is what gets rounded; the offset may be much shorter.
    if (!(far > radius + region.tolerance * (length + radius))) return;
    const double share = radius / far;
    EMBEDGRAD_DISPATCH(place_row, e, anchor, d, share, 1 - share, 0.0, Across{}, moved, lengths)
}

// The t with mean(max(cosine, t)) = τ, for cosines whose mean is below τ.
double water_level(std::vector<double> cosines, double tau) {
    std::sort(cosines.begin(), cosines.end());
    const size_t n = cosines.size();
    double above = 0;
    for (size_t j = 1; j < n; ++j) above += cosines[j];
    for (size_t j = 0; j < n; ++j) {  // the level if the j + 1 lowest are raised
        const double level = (static_cast<double>(n) * tau - above) / static_cast<double>(j + 1);
        if (j + 1 == n || level <= cosines[j + 1]) return std::min(1.0, level);
        above -= cosines[j + 1];
    }
    return tau;
}

// Turns every row whose cosine is below the level until its cosine is the level; see MeanCosine in
// embedgrad/maths/trust_region.py.
void project_mean(
    const TrustRegion& region, Rows<float> e, Rows<float> anchor, std::vector<Lengths>& lengths, int64_t d,
    bool* projected) {
    std::vector<double> cosines;
    std::vector<int64_t> directed;
    double total = 0, sines = 0;
    for (size_t t = 0; t < lengths.size(); ++t) {
        if (!(lengths[t].aa > 0) || !std::isfinite(lengths[t].ee)) continue;
        PromptRow row(e.at(t), anchor.at(t), d, lengths[t]);
        const bool any = row.length > 0;
        cosines.push_back(any ? row.along / row.length : 0);
        directed.push_back(static_cast<int64_t>(t));
        total += cosines.back();
        sines += any ? row.split() / row.length : 1;
    }
    const double n = static_cast<double>(directed.size());
    const double least = region.tau - region.tolerance * (sines / n) - region.tolerance * region.tolerance;
    if (directed.empty() || total / n >= least) return;
    const double level = water_level(cosines, region.tau), sine = std::sqrt(std::max(0.0, 1 - level * level));
    for (size_t i = 0; i < directed.size(); ++i) {
        if (!(cosines[i] < level)) continue;
        const int64_t t = directed[i];
        PromptRow row(e.at(t), anchor.at(t), d, lengths[t]);
        row.split();
        if (row.length > 0 && (row.has_plane() || level >= 1))
            row.turn(row.length * level, row.length * sine, projected[t]);
        else
            row.onto_anchor(1, projected[t]);
    }
}

// The cosine is 0 where e = 0. Both numbers are 1 where e0 = 0: such a row has no direction and no scale to leave.
void report(const Lengths& x, double& similarity, double& norm_ratio) {
    const double length = std::sqrt(x.ee), anchor = std::sqrt(x.aa);
    const double cosine = length > 0 ? x.ea / length / (anchor > 0 ? anchor : 1) : 0;
    similarity = anchor > 0 ? std::min(1.0, std::max(-1.0, cosine)) : 1;
    norm_ratio = anchor > 0 ? length / anchor : 1;
}

double norm_of(const Pool& pool, const PromptRows& x) {
    std::vector<double> squared(x.k);
    pool.run(x.k, rows_per_thread(x.d), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) EMBEDGRAD_DISPATCH(sum_of_squares, x.g.at(t), x.d, squared[t])
    });
    return std::sqrt(std::accumulate(squared.begin(), squared.end(), 0.0));
}

void keep(const PromptRows& x, int64_t t) {
    const Rows<float> from[] = {x.e, x.m, x.v};
    for (int i = 0; i < 3; ++i) std::copy_n(from[i].at(t), x.d, x.before + (i * x.k + t) * x.d);
}

void restore(const PromptRows& x, int64_t t) {
    const Rows<float> to[] = {x.e, x.m, x.v};
    for (int i = 0; i < 3; ++i) std::copy_n(x.before + (i * x.k + t) * x.d, x.d, to[i].at(t));
}

}  // namespace

void prompt_step(
    const Pool& pool, const AdamW& adamw, const TrustRegion& region, double limit, const PromptRows& x,
    const StepReport& out) {
    const double norm = *out.gradient_norm = norm_of(pool, x);
    const float clip = limit >= 0 && norm > limit ? static_cast<float>(limit / norm) : 1.0f;
    std::vector<Lengths> lengths(x.k);
    pool.run(x.k, rows_per_thread(x.d), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            keep(x, t);
            out.projected[t] = false;
            float* e = x.e.at(t);
            const float* anchor = x.anchor.at(t);
            Lengths& sums = lengths[t];
            EMBEDGRAD_DISPATCH(adamw_row, adamw, clip, e, anchor, x.m.at(t), x.v.at(t), x.g.at(t), x.d, sums)
            if (region.kind == TrustRegion::cosine && sums.aa > 0 && std::isfinite(sums.ee)) {
                PromptRow row(e, anchor, x.d, sums);
                project_cosine(region, row, out.projected[t]);
            } else if (region.kind == TrustRegion::l2_ball) {
                project_ball(region, e, anchor, x.d, sums, out.projected[t]);
            }
        }
    });
    if (region.kind == TrustRegion::mean_cosine) project_mean(region, x.e, x.anchor, lengths, x.d, out.projected);
    bool& alive = *out.alive;
    alive = alive && std::isfinite(norm);
    for (const Lengths& sums : lengths) alive = alive && sums.finite_moments && std::isfinite(sums.ee);
    for (int64_t t = 0; t < x.k; ++t) {
        if (!alive) {
            restore(x, t);
            out.projected[t] = false;
            EMBEDGRAD_DISPATCH(measure, x.e.at(t), x.anchor.at(t), x.d, lengths[t])
        }
        report(lengths[t], out.similarity[t], out.norm_ratio[t]);
    }
}

}  // namespace embedgrad

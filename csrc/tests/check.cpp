// The library's products, dense and packed, and its expansion, at every level of this processor against sums in double: for
// processors on which the Python tests do not run, such as an emulated one. Exits with 1 and says where a result is wrong.

#include "sparse_engine.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 generator(0);

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(generator);
}

// fp32 to the 16-bit types and back, by the compiler's or the plainest means at hand.
uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

double from_fp16(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  double magnitude = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Of a value that fp16 holds exactly, within its normal range.
uint16_t to_fp16(float value) {
  int exponent;
  double fraction = frexp(fabs(value), &exponent); // 0.5 .. 1
  if (fraction == 0) return 0;
  return uint16_t((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (int(fraction * 2048) & 1023));
}

struct Elements {
  int dtype;
  std::vector<uint8_t> bytes;
  std::vector<double> exact;

  void add(float value) {
    uint8_t raw[4];
    int size = dtype == SPARSE_ENGINE_FP32 ? 4 : 2;
    if (dtype == SPARSE_ENGINE_FP32) {
      memcpy(raw, &value, 4);
      exact.push_back(value);
    } else {
      uint16_t half = dtype == SPARSE_ENGINE_BF16 ? to_bf16(value) : to_fp16(roundf(value * 8) / 8);
      memcpy(raw, &half, 2);
      exact.push_back(dtype == SPARSE_ENGINE_BF16 ? from_bf16(half) : from_fp16(half));
    }
    bytes.insert(bytes.end(), raw, raw + size);
  }

  double at(size_t i) const {
    uint16_t half;
    float value;
    if (dtype == SPARSE_ENGINE_FP32) {
      memcpy(&value, &bytes[4 * i], 4);
      return value;
    }
    memcpy(&half, &bytes[2 * i], 2);
    return dtype == SPARSE_ENGINE_BF16 ? from_bf16(half) : from_fp16(half);
  }
};

int failures = 0, checks = 0;

void compare(const Elements& got, const std::vector<double>& wanted, double tolerance, const std::string& what) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += pow(got.at(i) - wanted[i], 2);
    scale += pow(wanted[i], 2);
  }
  ++checks;
  if (sqrt(error) <= tolerance * sqrt(scale)) return; // false for NaN
  ++failures;
  fprintf(stderr, "%s: relative error %.2e\n", what.c_str(), sqrt(error / scale));
}

void product(const char* level, int dtype, int64_t rows, int64_t columns, int64_t m, bool two_of_four) {
  const double tolerance[] = {1e-2, 2e-3, 1e-5};
  int size = dtype == SPARSE_ENGINE_FP32 ? 4 : 2;
  int64_t mask_bytes = (columns + 7) / 8;
  std::vector<uint8_t> bitmask(size_t(rows * mask_bytes));
  std::vector<int64_t> offsets{0};
  std::vector<double> dense(size_t(rows * columns));
  Elements values{dtype, {}, {}}, whole{dtype, {}, {}}, x{dtype, {}, {}}, bias{dtype, {}, {}};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      static const uint8_t nibbles[] = {3, 5, 6, 9, 10, 12};
      static uint8_t nibble = 0;
      if (c % 4 == 0) nibble = two_of_four ? nibbles[generator() % 6] : uint8_t(generator() & 15);
      bool keep = nibble >> (c % 4) & 1;
      float value = keep ? normal() : 0.0f;
      whole.add(value);
      dense[size_t(r * columns + c)] = whole.exact.back();
      if (!keep) continue;
      bitmask[size_t(r * mask_bytes + c / 8)] |= uint8_t(1 << c % 8);
      values.add(value);
    }
    offsets.push_back(int64_t(values.exact.size()));
    bias.add(normal());
  }
  for (int64_t i = 0; i < m * columns; ++i)
    x.add(normal());
  std::vector<double> wanted(size_t(m * rows));
  for (int64_t j = 0; j < m; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias.exact[size_t(r)];
      for (int64_t c = 0; c < columns; ++c)
        sum += x.exact[size_t(j * columns + c)] * dense[size_t(r * columns + c)];
      wanted[size_t(j * rows + r)] = sum;
    }
  std::string what = std::string(level) + " dtype " + std::to_string(dtype) + ", " + std::to_string(rows) + " x " +
                     std::to_string(columns) + ", m = " + std::to_string(m);
  const int64_t* located = two_of_four ? nullptr : offsets.data();
  Elements y{dtype, std::vector<uint8_t>(size_t(m * rows * size), 0xff), {}};
  if (sparse_engine_linear(dtype, x.bytes.data(), dtype, values.bytes.data(), int64_t(values.exact.size()), nullptr, bitmask.data(),
                           located, columns / 2, 4, bias.bytes.data(), y.bytes.data(), m, rows, columns, 2))
    ++failures;
  compare(y, wanted, tolerance[dtype], what + " packed");
  y.bytes.assign(y.bytes.size(), 0xff);
  if (sparse_engine_dense_linear(dtype, x.bytes.data(), dtype, whole.bytes.data(), nullptr, bias.bytes.data(), y.bytes.data(), m, rows,
                                 columns, 2))
    ++failures;
  compare(y, wanted, tolerance[dtype], what + " dense");
  for (int out : {dtype, int(SPARSE_ENGINE_FP32)}) {
    Elements tile{out, std::vector<uint8_t>(size_t(rows * columns * (out == SPARSE_ENGINE_FP32 ? 4 : 2)), 0xff), {}};
    if (sparse_engine_expand_tile(dtype, out, values.bytes.data(), int64_t(values.exact.size()), nullptr, bitmask.data(), located,
                                  columns / 2, 4, 0, rows, columns, tile.bytes.data(), 2))
      ++failures;
    compare(tile, dense, 0.0, what + " expanded");
  }
}

} // namespace

int main() {
  std::string levels = sparse_engine_supported_isas();
  for (size_t begin = 0; begin < levels.size();) {
    size_t end = levels.find(',', begin);
    if (end == std::string::npos) end = levels.size();
    std::string level = levels.substr(begin, end - begin);
    begin = end + 1;
    if (sparse_engine_set_isa(level.c_str())) return 1;
    for (int dtype = 0; dtype < 3; ++dtype)
      for (int64_t m : {1, 2, 5, 8, 17, 33}) {
        product(level.c_str(), dtype, 7, 132, m, true);
        product(level.c_str(), dtype, 13, 64, m, true);
        product(level.c_str(), dtype, 6, 77, m, false);
        product(level.c_str(), dtype, 3, 5, m, false);
      }
  }
  printf("%s: %d passed, %d failed\n", levels.c_str(), checks - failures, failures);
  return failures != 0;
}

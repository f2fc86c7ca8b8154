// One request for a ranking, from JSON to the raw ids and raw values that the model takes.
#pragma once

#include <cstdint>
#include <istream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace dashclip {

// The id that stands for a missing one.
inline constexpr std::int64_t kMissingId = INT64_MIN;

struct Feature {
  enum class Type { kInteger, kString, kNumber };

  std::string name;
  Type type;
};

// The features of an exported ranker, as its manifest lists them.
struct InputSpec {
  std::vector<Feature> request;
  std::vector<Feature> candidate;
};

// One request of C candidates and a history of H purchases. A feature has one value if it belongs
// to the request, C if it belongs to the candidates, and is absent if the JSON leaves it out.
struct Request {
  std::string query;
  std::vector<std::int64_t> history;      // [H] product ids, most recent first
  std::vector<std::int16_t> history_age;  // [H] days
  std::vector<std::int64_t> products;     // [C]
  std::map<std::string, std::vector<std::int64_t>> ids;  // kMissingId where missing
  std::map<std::string, std::vector<std::optional<std::string>>> strings;
  std::map<std::string, std::vector<float>> values;  // NaN where missing
};

// Throws BadInput, which names what is wrong.
Request parse_request(const nlohmann::json& json, const InputSpec& inputs);

// Reads the JSON documents of a stream one after the other, so that a file may hold one request in
// any layout, or one on each line.
class RequestReader {
 public:
  RequestReader(std::istream& stream, const InputSpec& inputs) : stream_(stream), inputs_(inputs) {}

  // Returns the next request, or nothing at the end; throws BadInput, which gives its number.
  std::optional<Request> next();

 private:
  std::istream& stream_;
  const InputSpec& inputs_;
  int number_ = 0;
};

}  // namespace dashclip

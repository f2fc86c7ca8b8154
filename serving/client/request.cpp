#include "request.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include <nlohmann/json.hpp>

#include "bad_input.h"

namespace dashclip {
namespace {

using nlohmann::json;

// Returns a value as errors show it: short, on one line, whatever was sent.
std::string shown(const json& value) {
  constexpr std::size_t kLongest = 80;
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  if (value.is_string() && value.get_ref<const std::string&>().size() > kLongest) {
    return "a long string";
  }
  return value.dump();
}

[[noreturn]] void refuse(const std::string& where, const std::string& rule, const json& value) {
  throw BadInput(where + ": must be " + rule + ", got " + shown(value));
}

void check_keys(const std::string& where, const json& object,
                std::initializer_list<const char*> known) {
  for (const auto& [key, value] : object.items()) {
    bool found = false;
    for (const char* name : known) found = found || key == name;
    if (!found) throw BadInput(where + ": unknown key " + shown(key));
  }
}

// Returns the value of a key, or nullptr where it is left out or null, which are the same.
const json* find(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

const json& need(const std::string& where, const json& object, const char* key) {
  const json* found = find(object, key);
  if (found == nullptr) throw BadInput(where + ": '" + key + "' is missing");
  return *found;
}

std::int64_t integer(const std::string& where, const json& value) {
  if (!value.is_number_integer()) refuse(where, "an integer", value);
  constexpr auto kLargest = std::numeric_limits<std::int64_t>::max();
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{kLargest}) {
    refuse(where, "an integer of 64 bits", value);
  }
  return value.get<std::int64_t>();
}

float number(const std::string& where, const json& value) {
  if (!value.is_number()) refuse(where, "a number", value);
  const auto exact = value.get<double>();
  if (std::abs(exact) > std::numeric_limits<float>::max()) {
    refuse(where, "a number of 32 bits", value);
  }
  return static_cast<float>(exact);
}

const json::array_t& list(const std::string& where, const json& value) {
  if (!value.is_array()) refuse(where, "a list", value);
  return value.get_ref<const json::array_t&>();
}

std::vector<std::int64_t> integers(const std::string& where, const json& value) {
  std::vector<std::int64_t> result;
  for (const json& item : list(where, value)) result.push_back(integer(where, item));
  return result;
}

std::vector<std::int16_t> ages(const std::string& where, const json& value, std::size_t purchases) {
  std::vector<std::int16_t> result;
  for (const std::int64_t age : integers(where, value)) {
    if (age < 0 || age > INT16_MAX) refuse(where, "whole days from 0 to 32767", age);
    result.push_back(static_cast<std::int16_t>(age));
  }
  if (result.size() != purchases) {
    throw BadInput(where + ": has " + std::to_string(result.size()) + " values for " +
                   std::to_string(purchases) + " purchases");
  }
  return result;
}

// Appends one value of a feature, or what stands for a missing one.
void add_value(const std::string& where, const Feature& feature, const json& value,
               Request& request) {
  const bool missing = value.is_null();
  switch (feature.type) {
    case Feature::Type::kInteger:
      request.ids[feature.name].push_back(missing ? kMissingId : integer(where, value));
      return;
    case Feature::Type::kNumber:
      request.values[feature.name].push_back(missing ? std::nanf("") : number(where, value));
      return;
    case Feature::Type::kString:
      if (!missing && !value.is_string()) refuse(where, "a string", value);
      auto& texts = request.strings[feature.name];
      if (missing) {
        texts.emplace_back();
      } else {
        texts.emplace_back(value.get<std::string>());
      }
  }
}

// Gives a feature without a single value, as it has when there are no candidates, its empty column.
void add_column(const Feature& feature, Request& request) {
  switch (feature.type) {
    case Feature::Type::kInteger:
      request.ids[feature.name];
      return;
    case Feature::Type::kNumber:
      request.values[feature.name];
      return;
    case Feature::Type::kString:
      request.strings[feature.name];
  }
}

const Feature& find_feature(const std::string& where, const std::vector<Feature>& features,
                            const std::string& name) {
  for (const Feature& feature : features) {
    if (feature.name == name) return feature;
  }
  throw BadInput(where + ": unknown feature " + shown(name));
}

const json& features_of(const std::string& where, const json& object) {
  static const json nothing = json::object();
  const json* found = find(object, "features");
  if (found == nullptr) return nothing;
  if (!found->is_object()) refuse(where, "an object", *found);
  return *found;
}

void add_request_features(const json& object, const std::vector<Feature>& known, Request& request) {
  for (const auto& [name, value] : features_of("features", object).items()) {
    const Feature& feature = find_feature("features", known, name);
    add_value("features." + name, feature, value, request);
  }
}

void add_candidates(const json& candidates, const std::vector<Feature>& known, Request& request) {
  const std::string where = "candidates";
  if (!candidates.is_object()) refuse(where, "an object", candidates);
  check_keys(where, candidates, {"product_id", "features"});
  request.products = integers(where + ".product_id", need(where, candidates, "product_id"));
  const std::string prefix = where + ".features";
  for (const auto& [name, column] : features_of(prefix, candidates).items()) {
    const Feature& feature = find_feature(prefix, known, name);
    if (column.is_null()) continue;
    const std::string path = prefix + "." + name;
    const json::array_t& values = list(path, column);
    if (values.size() != request.products.size()) {
      throw BadInput(path + ": has " + std::to_string(values.size()) + " values for " +
                     std::to_string(request.products.size()) + " candidates");
    }
    add_column(feature, request);
    for (const json& value : values) add_value(path, feature, value, request);
  }
}

}  // namespace

Request parse_request(const json& json, const InputSpec& inputs) {
  if (!json.is_object()) refuse("the request", "an object", json);
  check_keys("the request", json,
             {"query", "user_id", "history", "history_age_days", "features", "candidates"});
  Request request;
  const auto& query = need("the request", json, "query");
  if (!query.is_string()) refuse("query", "a string", query);
  request.query = query.get<std::string>();
  if (const auto* user = find(json, "user_id")) integer("user_id", *user);  // no model reads it
  if (const auto* history = find(json, "history")) request.history = integers("history", *history);
  request.history_age.resize(request.history.size());
  if (const auto* age = find(json, "history_age_days")) {
    request.history_age = ages("history_age_days", *age, request.history.size());
  }
  add_request_features(json, inputs.request, request);
  add_candidates(need("the request", json, "candidates"), inputs.candidate, request);
  return request;
}

std::optional<Request> RequestReader::next() {
  stream_ >> std::ws;
  if (stream_.bad()) throw BadInput("the requests cannot be read");
  if (stream_.eof()) {
    if (number_ == 0) throw BadInput("there is no request to score");
    return std::nullopt;
  }
  ++number_;
  try {
    json document;
    stream_ >> document;
    return parse_request(document, inputs_);
  } catch (const json::exception& error) {
    const std::string text = error.what();  // "[json.exception.…] what is wrong and where"
    throw BadInput("request " + std::to_string(number_) + ": not valid JSON: " +
                   text.substr(text.find("] ") + 2));
  } catch (const BadInput& error) {
    throw BadInput("request " + std::to_string(number_) + ": " + error.what());
  }
}

}  // namespace dashclip

// Scores requests with an exported ranker, without Python.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "bad_input.h"
#include "exported_folder.h"
#include "ranker.h"
#include "request.h"

namespace dashclip {
namespace {

constexpr const char* kHelp =
    R"(usage: dashclip-rank [--operators LIBRARY]... [--repeat N] FOLDER [REQUESTS]

Scores search requests with an exported ranker and prints, for each of them, one line
{"probabilities": [...], "order": [...]}: the probability of a click on each candidate, and the
places of the candidates, best first.

  FOLDER               what export-ranker wrote; the SHA-256 of ranker.pt is verified
  REQUESTS             a file of JSON requests, one after the other; standard input if left out
  --operators LIBRARY  a library of operators that the model needs, such as
                       fbgemm_gpu_tbe_inference.so of the Python package fbgemm_gpu; may be repeated
  --repeat N           score each request N more times and add "latency_ms": {"repeats", "p50",
                       "p99"}, from the parsed request to its probabilities, on one thread
  --help               print this

Ends with status 2 and one sentence on standard error when an input is bad.
)";

struct Arguments {
  bool help = false;
  int repeat = 0;
  std::vector<std::string> operators;
  std::string folder;
  std::string requests;  // empty for standard input
};

int positive(const std::string& option, std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 1) {
    throw BadInput(option + ": must be an integer of 1 or more, got '" + std::string(text) + "'");
  }
  return number;
}

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  std::vector<std::string> paths;
  for (std::size_t place = 0; place < words.size(); ++place) {
    const std::string& word = words[place];
    if (word == "--help" || word == "-h") {
      arguments.help = true;
    } else if (word == "--operators" || word == "--repeat") {
      if (++place == words.size()) throw BadInput(word + ": a value is missing");
      if (word == "--repeat") {
        arguments.repeat = positive(word, words[place]);
      } else {
        arguments.operators.push_back(words[place]);
      }
    } else if (word.size() > 1 && word[0] == '-') {
      throw BadInput("unknown option '" + word + "'; --help lists them");
    } else {
      paths.push_back(word);
    }
  }
  if (arguments.help) return arguments;
  if (paths.empty() || paths.size() > 2) {
    throw BadInput("give the folder of an exported ranker and at most one file of requests; "
                   "--help says more");
  }
  arguments.folder = paths[0];
  if (paths.size() == 2 && paths[1] != "-") arguments.requests = paths[1];
  return arguments;
}

// Returns the places of the candidates, best first; equal ones in the request's order.
std::vector<std::size_t> best_first(const std::vector<float>& probabilities) {
  std::vector<std::size_t> order(probabilities.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t left, std::size_t right) {
    return probabilities[left] > probabilities[right];
  });
  return order;
}

// Returns the smallest of the sorted `times` that a share of them does not exceed.
double percentile(const std::vector<double>& times, double share) {
  const auto rank = std::ceil(share * static_cast<double>(times.size()));
  return times[static_cast<std::size_t>(rank) - 1];
}

nlohmann::ordered_json latency(Ranker& ranker, const Request& request, int repeats) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  times.reserve(static_cast<std::size_t>(repeats));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const auto start = Clock::now();
    ranker.score(request);
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return {{"repeats", repeats}, {"p50", percentile(times, 0.5)}, {"p99", percentile(times, 0.99)}};
}

void run(const Arguments& arguments) {
  const ExportedFolder exported = open_exported(arguments.folder);
  std::ifstream file(arguments.requests);
  if (!arguments.requests.empty() && !file) {
    throw BadInput(arguments.requests + ": cannot be read");
  }
  for (const std::string& library : arguments.operators) load_operators(library);
  Ranker ranker(exported.model);
  RequestReader reader(arguments.requests.empty() ? std::cin : file, exported.inputs);
  while (const auto request = reader.next()) {
    const std::vector<float> probabilities = ranker.score(*request);
    nlohmann::ordered_json answer;
    answer["probabilities"] = probabilities;
    answer["order"] = best_first(probabilities);
    if (arguments.repeat > 0) {
      answer["latency_ms"] = latency(ranker, *request, arguments.repeat);
    }
    std::cout << answer.dump() << std::endl;  // flushed, so that a pipe may ask and answer in turn
    if (!std::cout) throw BadInput("standard output: cannot be written");
  }
}

}  // namespace
}  // namespace dashclip

int main(int count, char** words) {
  std::ios::sync_with_stdio(false);
  try {
    const auto arguments = dashclip::parse_arguments({words + 1, words + count});
    if (arguments.help) {
      std::cout << dashclip::kHelp;
    } else {
      dashclip::run(arguments);
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "dashclip-rank: " << error.what() << '\n';
    return 2;
  }
}

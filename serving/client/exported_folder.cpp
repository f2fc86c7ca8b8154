#include "exported_folder.h"

#include <array>
#include <fstream>
#include <memory>

#include <nlohmann/json.hpp>
#include <openssl/evp.h>

#include "bad_input.h"

namespace dashclip {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;
constexpr const char* kModel = "ranker.pt";

std::string sha256(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw BadInput(path.string() + ": cannot be read");
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> digest(EVP_MD_CTX_new(),
                                                                      &EVP_MD_CTX_free);
  EVP_DigestInit_ex(digest.get(), EVP_sha256(), nullptr);
  std::vector<char> block(1 << 20);
  while (file) {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    EVP_DigestUpdate(digest.get(), block.data(), static_cast<std::size_t>(file.gcount()));
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> bytes{};
  unsigned int size = 0;
  EVP_DigestFinal_ex(digest.get(), bytes.data(), &size);
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    constexpr const char* kDigits = "0123456789abcdef";
    text += {kDigits[bytes[i] >> 4], kDigits[bytes[i] & 15]};
  }
  return text;
}

Feature parse_feature(const json& entry) {
  const auto type = entry.at("type").get<std::string>();
  const auto name = entry.at("name").get<std::string>();
  if (type == "int64") return {name, Feature::Type::kInteger};
  if (type == "string") return {name, Feature::Type::kString};
  if (type == "float32") return {name, Feature::Type::kNumber};
  throw BadInput("manifest.json: feature '" + name + "' has the unknown type '" + type + "'");
}

std::vector<Feature> parse_features(const json& entries) {
  std::vector<Feature> features;
  for (const json& entry : entries) features.push_back(parse_feature(entry));
  return features;
}

}  // namespace

ExportedFolder open_exported(const std::filesystem::path& folder) {
  const auto path = folder / "manifest.json";
  std::ifstream file(path);
  if (!file) throw BadInput(path.string() + ": cannot be read; `export-ranker` writes it");
  ExportedFolder exported;
  std::string expected;
  try {
    const json manifest = json::parse(file);
    if (manifest.at("format") != kFormat) {
      throw BadInput(path.string() + ": this program reads format " + std::to_string(kFormat) +
                     ", got " + manifest["format"].dump());
    }
    const json& inputs = manifest.at("inputs");
    exported.inputs = {parse_features(inputs.at("request")),
                       parse_features(inputs.at("candidate"))};
    expected = manifest.at("files").at(kModel).at("sha256").get<std::string>();
  } catch (const json::exception& error) {
    const std::string text = error.what();
    throw BadInput(path.string() + ": is no manifest of an exported ranker: " +
                   text.substr(text.find("] ") + 2));
  }
  exported.model = folder / kModel;
  if (sha256(exported.model) != expected) {
    throw BadInput(exported.model.string() + ": is damaged: its SHA-256 is not the manifest's");
  }
  return exported;
}

}  // namespace dashclip

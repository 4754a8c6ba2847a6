// Whole model directories, written here, through LoadModelDirectory.
#include "core/model_directory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <string>

#include "core/error.h"
#include "tests/core/tiny_models.h"

namespace attn {
namespace {

using nlohmann::json;
using namespace attn::testing;  // NOLINT: fixtures of this folder

bool Contains(const absl::Status& status, const std::string& text) {
  return std::string(status.message()).find(text) != std::string::npos;
}

std::vector<float> Floats(const Parameter& parameter) {
  EXPECT_EQ(parameter.dtype, DType::kFloat32);
  std::vector<float> values(static_cast<std::size_t>(parameter.num_elements()));
  std::memcpy(values.data(), parameter.data.get(), parameter.bytes());
  return values;
}

// A root with one model, "m".
class ModelDirectoryTest : public ::testing::Test {
 protected:
  ModelDirectoryTest() { std::filesystem::create_directories(model()); }

  std::string root() const { return parent_ / "root"; }
  std::string model() const { return root() + "/m"; }
  std::string outside() const { return parent_ / "outside"; }

  absl::StatusOr<LoadedModel> Load(ModelSpec spec) const {
    return LoadModelDirectory(spec, {.model_root = root(), .run_slice = {}});
  }
  absl::StatusOr<LoadedModel> Load(const std::string& weights = "m") const {
    ModelSpec spec;
    spec.weights = weights;
    return Load(spec);
  }

  void ExpectError(const absl::StatusOr<LoadedModel>& model, absl::StatusCode code,
                   const std::string& reason, const std::string& text) const {
    ASSERT_FALSE(model.ok()) << "expected " << text;
    EXPECT_EQ(model.status().code(), code) << model.status();
    EXPECT_EQ(ErrorReason(model.status()), reason) << model.status();
    EXPECT_TRUE(Contains(model.status(), text)) << model.status().message();
    EXPECT_FALSE(Contains(model.status(), parent_.path())) << model.status().message();
  }
  void ExpectBad(const absl::StatusOr<LoadedModel>& model, const std::string& text) const {
    ExpectError(model, absl::StatusCode::kInvalidArgument, "BAD_MODEL_DIRECTORY", text);
  }
  void ExpectBadPath(const absl::StatusOr<LoadedModel>& model, const std::string& text) const {
    ExpectError(model, absl::StatusCode::kInvalidArgument, "BAD_PATH", text);
  }

  TemporaryDirectory parent_;
};

TEST_F(ModelDirectoryTest, LoadsBert) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  ModelSpec asked;
  asked.name = "mine";
  asked.weights = "m";
  asked.cache_dtype = DType::kInt8;
  const auto loaded = Load(asked);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const ModelSpec& spec = loaded->spec;
  EXPECT_EQ(spec.name, "mine");
  EXPECT_EQ(spec.cache_dtype, DType::kInt8);
  EXPECT_EQ(spec.dtype, DType::kFloat32);
  EXPECT_EQ(spec.modality, Modality::kLanguage);
  ASSERT_EQ(spec.stacks.size(), 1u);
  EXPECT_EQ(spec.stacks[0].name, "");
  EXPECT_EQ(spec.stacks[0].modality, Modality::kLanguage);
  EXPECT_EQ(spec.stacks[0].hidden_size, 4u);
  EXPECT_EQ(spec.stacks[0].max_positions, 16u);
  ASSERT_EQ(spec.stacks[0].self_attention.size(), 1u);
  const LayerSpec& layer = spec.stacks[0].self_attention[0];
  EXPECT_EQ(layer.repeat, 2u);
  EXPECT_EQ(layer.num_heads, 2u);
  EXPECT_EQ(layer.num_kv_heads, 2u);
  EXPECT_EQ(layer.head_dim, 2u);
  EXPECT_EQ(layer.value_dim, 2u);
  EXPECT_EQ(layer.options.is_causal, false);
  EXPECT_FALSE(layer.options.scale.has_value());
  EXPECT_TRUE(spec.stacks[0].cross_attention.empty());
}

TEST_F(ModelDirectoryTest, ConcatenatesQueryKeyValue) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->stacks.size(), 1u);
  ASSERT_EQ(loaded->stacks[0].self_attention.size(), 2u);
  const LayerWeights& second = loaded->stacks[0].self_attention[1];
  EXPECT_EQ(second.query_key_value.weight.shape, (std::vector<std::int64_t>{12, 4}));
  const std::vector<float> weight = Floats(second.query_key_value.weight);
  for (std::size_t part = 0; part < 3; ++part) {
    for (std::size_t i = 0; i < 16; ++i) {
      EXPECT_EQ(weight[part * 16 + i],
                100.0f + 10.0f * static_cast<float>(part) + static_cast<float>(i) / 8.0f);
    }
  }
  EXPECT_EQ(second.query_key_value.bias.shape, (std::vector<std::int64_t>{12}));
  const std::vector<float> bias = Floats(second.query_key_value.bias);
  EXPECT_EQ(bias[0], 105.0f);
  EXPECT_EQ(bias[4], 115.0f);
  EXPECT_EQ(bias[11], 125.0f + 3.0f / 8.0f);
  EXPECT_EQ(second.output.weight.shape, (std::vector<std::int64_t>{4, 4}));
  EXPECT_EQ(Floats(second.output.weight)[1], 130.125f);
  EXPECT_EQ(Floats(second.output.bias)[0], 135.0f);
  EXPECT_FALSE(second.query_norm.defined());
  for (const Parameter* parameter :
       {&second.query_key_value.weight, &second.query_key_value.bias, &second.output.bias}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(parameter->data.get()) % 64, 0u);
  }
}

TEST_F(ModelDirectoryTest, KnowsEveryNameOfATensor) {
  const struct {
    json config;
    TinyNames names;
  } cases[] = {{TinyBertConfig(), BertNames("bert.")},
               {TinyVitConfig(), OldVitNames()},
               {TinyVitConfig(), OldVitNames("vit.")},
               {TinyVitConfig(), NewVitNames()},
               {TinyVitConfig(), NewVitNames("vit.")}};
  for (const auto& [config, names] : cases) {
    WriteModel(model(), config, TinyTensors(names));
    const auto loaded = Load();
    ASSERT_TRUE(loaded.ok()) << names.prefix << names.query << loaded.status();
    EXPECT_EQ(Floats(loaded->stacks[0].self_attention[1].output.weight)[0], 130.0f);
  }
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames("roberta.")));
  ExpectBad(Load(), "encoder.layer.0.attention.self.query.weight is missing");
}

TEST_F(ModelDirectoryTest, LoadsVit) {
  WriteModel(model(), TinyVitConfig(), TinyTensors(OldVitNames("vit.")));
  auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.modality, Modality::kVision);
  EXPECT_EQ(loaded->spec.stacks[0].max_positions, 0u);
  EXPECT_TRUE(loaded->stacks[0].self_attention[0].query_key_value.bias.defined());

  json config = TinyVitConfig();
  config["qkv_bias"] = false;
  WriteModel(model(), config, TinyTensors(OldVitNames("vit."), 2, false));
  loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_FALSE(loaded->stacks[0].self_attention[0].query_key_value.bias.defined());
  EXPECT_TRUE(loaded->stacks[0].self_attention[0].output.bias.defined());

  WriteModel(model(), config, TinyTensors(OldVitNames("vit.")));
  ExpectBad(Load(), "vit.encoder.layer.0.attention.attention.query.bias is there");
}

TEST_F(ModelDirectoryTest, VitMaySetItsHeadDim) {
  json config = TinyVitConfig();
  config["head_dim"] = 3;
  std::vector<TestTensor> tensors;
  const TinyNames names = NewVitNames();
  for (const std::string& name : {names.query, names.key, names.value}) {
    tensors.push_back(FloatTensor("layers.0" + name + ".weight", {6, 4}));
    tensors.push_back(FloatTensor("layers.0" + name + ".bias", {6}));
  }
  tensors.push_back(FloatTensor("layers.0.attention.o_proj.weight", {4, 6}));
  tensors.push_back(FloatTensor("layers.0.attention.o_proj.bias", {4}));
  config["num_hidden_layers"] = 1;
  WriteModel(model(), config, tensors);
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.stacks[0].self_attention[0].head_dim, 3u);
}

TEST_F(ModelDirectoryTest, NamesTheFieldThatIsWrong) {
  const struct {
    const char* field;
    json value;
  } cases[] = {
      {"hidden_size", nullptr},
      {"num_attention_heads", nullptr},
      {"num_hidden_layers", nullptr},
      {"max_position_embeddings", nullptr},
      {"model_type", nullptr},
      {"model_type", 7},
      {"hidden_size", 0},
      {"hidden_size", -4},
      {"hidden_size", 4.0},
      {"hidden_size", 4.5},
      {"hidden_size", "4"},
      {"hidden_size", true},
      {"hidden_size", json::array()},
      {"hidden_size", 1e300},
      {"num_hidden_layers", 0},
      {"num_hidden_layers", 1'000'000'000},
      {"num_hidden_layers", 1ull << 63},
      {"num_attention_heads", 3},
      {"num_attention_heads", 1ull << 32},
      {"max_position_embeddings", -1},
      {"position_embedding_type", 3},
  };
  for (const auto& [field, value] : cases) {
    json config = TinyBertConfig();
    config[field] = value;
    WriteModel(model(), config, TinyTensors(BertNames()));
    const auto loaded = Load();
    ExpectBad(loaded, field);
    const std::string text = value.is_null() ? "is missing" : value.dump();
    EXPECT_TRUE(Contains(loaded.status(), text)) << loaded.status().message();
  }
  json config = TinyBertConfig();
  config.erase("hidden_size");
  WriteModel(model(), config, TinyTensors(BertNames()));
  ExpectBad(Load(), "hidden_size is missing");
}

TEST_F(ModelDirectoryTest, RefusesWhatItDoesNotUnderstand) {
  const struct {
    json config;
    const char* field;
    json value;
  } cases[] = {
      {TinyBertConfig(), "model_type", "bart"},
      {TinyBertConfig(), "position_embedding_type", "relative_key"},
      {TinyBertConfig(), "is_decoder", true},
      {TinyBertConfig(), "add_cross_attention", true},
      {TinyBertConfig(), "quantization_config", {{"quant_method", "fp8"}}},
      {TinyBertConfig(), "pruned_heads", {{"0", {1}}}},
      {TinyBertConfig(), "rope_scaling", {{"type", "yarn"}}},
      {TinyBertConfig(), "head_dim", 8},
      {TinyVitConfig(), "quantization_config", {{"quant_method", "fp8"}}},
      {TinyVitConfig(), "sliding_window", 32},
  };
  for (const auto& [base, field, value] : cases) {
    json config = base;
    config[field] = value;
    WriteModel(model(), config, TinyTensors(BertNames()));
    const auto loaded = Load();
    ExpectError(loaded, absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL", field);
    EXPECT_TRUE(Contains(loaded.status(), value.dump())) << loaded.status().message();
    EXPECT_EQ(ErrorDetailsOf(loaded.status())["field"], field);
  }
  json config = TinyBertConfig();
  config.update({{"pruned_heads", json::object()}, {"rope_scaling", nullptr}});
  WriteModel(model(), config, TinyTensors(BertNames()));
  EXPECT_TRUE(Load().ok()) << "fields that are off change nothing";
}

TEST_F(ModelDirectoryTest, RefusesBrokenConfigs) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  const struct {
    std::string text;
    const char* problem;
  } cases[] = {{"", "not JSON"},
               {"[]", "not an object"},
               {"3", "not an object"},
               {"{", "not JSON"},
               {"{} {}", "not JSON"},
               {std::string("{}\0", 3), "NUL"},
               {"{\"a\":" + std::string(1'000'000, '['), "nested too deep"},
               {R"({"a":{"hidden_size":4,"hidden_size":4}})", "\"hidden_size\" twice"},
               {"{\"\xff\":1}", "not JSON"}};
  for (const auto& [text, problem] : cases) {
    WriteFile(model() + "/config.json", text);
    ExpectBad(Load(), problem);
    EXPECT_TRUE(Contains(Load().status(), "config.json"));
  }
  std::filesystem::resize_file(model() + "/config.json", std::uintmax_t{1} << 40);  // sparse
  ExpectBad(Load(), "config.json has 1099511627776 bytes");
  std::filesystem::remove(model() + "/config.json");
  ExpectBad(Load(), "config.json is missing");
  ASSERT_EQ(mkfifo((model() + "/config.json").c_str(), 0600), 0);
  ExpectBad(Load(), "config.json is not a regular file");
}

TEST_F(ModelDirectoryTest, NamesTheTensorThatIsWrong) {
  const std::string name = "encoder.layer.1.attention.self.key.weight";
  const auto with = [&](const std::function<void(std::vector<TestTensor>&, std::size_t)>& change) {
    std::vector<TestTensor> tensors = TinyTensors(BertNames());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].name != name) continue;
      change(tensors, i);
      break;
    }
    WriteModel(model(), TinyBertConfig(), tensors);
    return Load();
  };
  ExpectBad(with([](auto& t, std::size_t i) { t.erase(t.begin() + static_cast<long>(i)); }),
            name + " is missing");
  for (const std::vector<std::int64_t>& shape :
       {std::vector<std::int64_t>{2, 8}, {16}, {4, 4, 1}, {4, 2}, {5, 4}}) {
    ExpectBad(with([&](auto& t, std::size_t i) { t[i] = FloatTensor(name, shape); }),
              name + " has shape [");
  }
  ExpectError(with([&](auto& t, std::size_t i) {
                t[i] = {name, "F8_E4M3", {4, 4}, std::string(16, '\0')};
              }),
              absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL", name + " has dtype F8_E4M3");
  ExpectError(with([&](auto& t, std::size_t i) {
                t[i] = {name, "I32", {4, 4}, std::string(64, '\0')};
              }),
              absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL", name + " has dtype I32");
}

TEST_F(ModelDirectoryTest, RefusesTwoModelsInOne) {
  std::vector<TestTensor> tensors = TinyTensors(BertNames());
  for (TestTensor& tensor : TinyTensors(BertNames("bert."))) {
    if (tensor.name != "embeddings.weight") tensors.push_back(tensor);
  }
  WriteModel(model(), TinyBertConfig(), tensors);
  ExpectBad(Load(), "bert.encoder.layer.0.attention.self.query.weight");
}

TEST_F(ModelDirectoryTest, ReadsEveryFileOfAModel) {
  const std::vector<TestTensor> tensors = TinyTensors(BertNames());
  const auto half = tensors.begin() + 7;
  WriteFile(model() + "/config.json", TinyBertConfig().dump());
  WriteFile(model() + "/a.safetensors", SafetensorsBytes({tensors.begin(), half}));
  WriteFile(model() + "/b.safetensors", SafetensorsBytes({half, tensors.end()}));
  WriteFile(model() + "/._b.safetensors", "left by another system");
  EXPECT_TRUE(Load().ok()) << Load().status();

  WriteFile(model() + "/c.safetensors", SafetensorsBytes({*half}));
  ExpectBad(Load(), half->name);

  // With an index, c is not looked at.
  json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", json::object()}};
  for (auto tensor = tensors.begin(); tensor != tensors.end(); ++tensor) {
    index["weight_map"][tensor->name] = tensor < half ? "a.safetensors" : "b.safetensors";
  }
  WriteFile(model() + "/model.safetensors.index.json", index.dump());
  EXPECT_TRUE(Load().ok()) << Load().status();

  index["weight_map"]["one.more"] = "c.safetensors";
  WriteFile(model() + "/model.safetensors.index.json", index.dump());
  ExpectBad(Load(), half->name);
  index["weight_map"]["one.more"] = "d.safetensors";
  WriteFile(model() + "/model.safetensors.index.json", index.dump());
  ExpectBad(Load(), "d.safetensors is missing");
}

TEST_F(ModelDirectoryTest, RefusesBrokenIndexes) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  for (const json& file :
       {json("../model.safetensors"), json("/etc/x.safetensors"), json("..\\x.safetensors"),
        json(".."), json(""), json("config.json"), json(3), json(nullptr), json("x/y.safetensors"),
        json("a\n.safetensors"), json(".safetensors")}) {
    WriteFile(model() + "/model.safetensors.index.json",
              json({{"weight_map", {{"some.tensor", file}}}}).dump());
    ExpectBad(Load(), "some.tensor");
  }
  for (const char* text : {"{}", R"({"weight_map":{}})", R"({"weight_map":[]})", "{", ""}) {
    WriteFile(model() + "/model.safetensors.index.json", text);
    ExpectBad(Load(), "model.safetensors.index.json");
  }
}

TEST_F(ModelDirectoryTest, ReportsBrokenWeights) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  WriteFile(model() + "/model.safetensors", "12345678");
  ExpectError(Load(), absl::StatusCode::kInvalidArgument, "BAD_SAFETENSORS", "model.safetensors");
  std::filesystem::remove(model() + "/model.safetensors");
  ExpectBad(Load(), "no *.safetensors");
}

TEST_F(ModelDirectoryTest, StaysUnderItsRoot) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  std::filesystem::create_directories(outside());
  WriteModel(outside(), TinyBertConfig(), TinyTensors(BertNames()));
  std::filesystem::create_directories(parent_ / "root2");
  WriteModel(parent_ / "root2", TinyBertConfig(), TinyTensors(BertNames()));
  EXPECT_TRUE(Load("./m/").ok());

  for (const std::string& weights :
       {outside(), model(), std::string("../outside"), std::string(".."), std::string("m/../m"),
        std::string("m/.."), std::string("m\0x", 3)}) {
    ModelSpec spec;
    spec.weights = weights;
    const auto loaded = Load(spec);
    ASSERT_FALSE(loaded.ok()) << weights;
    EXPECT_EQ(ErrorReason(loaded.status()), "BAD_PATH") << loaded.status();
  }
  std::filesystem::create_directory_symlink(outside(), root() + "/absolute_link");
  std::filesystem::create_directory_symlink("../outside", root() + "/relative_link");
  std::filesystem::create_directory_symlink("../root2", root() + "/sibling_link");
  std::filesystem::create_directory_symlink("loop", root() + "/loop");
  for (const char* link : {"absolute_link", "relative_link", "sibling_link", "loop"}) {
    ExpectBadPath(Load(link), link);
  }
  std::filesystem::create_directory_symlink("m", root() + "/inner_link");
  EXPECT_TRUE(Load("inner_link").ok()) << "links within the root are fine";
  ExpectBad(Load("missing"), "missing");
  ExpectBad(Load("m/config.json"), "not a directory");
  ExpectError(Load(""), absl::StatusCode::kInvalidArgument, "INVALID_FIELD", "weights");
}

TEST_F(ModelDirectoryTest, FilesStayUnderTheRootToo) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  std::filesystem::create_directories(outside());
  WriteModel(outside(), TinyBertConfig(), TinyTensors(BertNames()));
  std::filesystem::create_directories(root() + "/blobs");
  for (const std::string& name : {std::string("config.json"), std::string("model.safetensors")}) {
    const std::string file = model() + "/" + name;
    std::filesystem::rename(file, root() + "/blobs/" + name);
    std::filesystem::create_symlink(outside() + "/" + name, file);
    ExpectBadPath(Load(), name);
    std::filesystem::remove(file);
    std::filesystem::create_symlink("../blobs/" + name, file);  // as hub caches lay them out
    EXPECT_TRUE(Load().ok()) << Load().status();
  }
  std::filesystem::create_symlink(outside() + "/none", model() + "/model.safetensors.index.json");
  ExpectBad(Load(), "model.safetensors.index.json is missing");
}

TEST_F(ModelDirectoryTest, WithoutARootAnyPathIsTheOperators) {
  WriteModel(model(), TinyBertConfig(), TinyTensors(BertNames()));
  ModelSpec spec;
  spec.weights = model();
  EXPECT_TRUE(LoadModelDirectory(spec, {}).ok());
  spec.weights = root() + "/../root/m";
  EXPECT_TRUE(LoadModelDirectory(spec, {}).ok());
}

}  // namespace
}  // namespace attn

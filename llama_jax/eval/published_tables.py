"""The scores that Meta published, as printed: percent, a model a line, a column a task, metric and number of examples.

A column is TASK/METRIC/SHOTS with the names of `eval.tasks`; a star behind it says that prompt or metric were other
than ours, so that a difference says little. Different harnesses give different scores for the same model: the April
2024 card of Llama 3 has BoolQ 65.5 for Llama 2 7B, the Llama 2 paper 77.4.
"""

# (source, columns, lines of scores; '-' where there is none)
TABLES: tuple[tuple[str, str, str], ...] = (
    (
        'LLaMA paper (arXiv:2302.13971), Table 3',
        'boolq/acc_answer/0 piqa/acc_norm/0 siqa/acc_norm/0 hellaswag/acc_norm/0 winogrande/acc/0 '
        'arc_easy/acc_norm/0 arc_challenge/acc_norm/0 openbookqa/acc_answer/0',
        """
        llama_7b   76.5 79.8 48.9 76.1 70.1 72.8 47.6 57.2
        llama_13b  78.1 80.1 50.4 79.2 73.0 74.8 52.7 56.4
        llama_33b  83.1 82.3 50.4 82.8 76.0 80.0 57.8 58.6
        llama_65b  85.3 82.8 52.3 84.2 77.0 78.9 56.0 60.2
        """,
    ),
    (
        'LLaMA paper (arXiv:2302.13971), Tables 4 and 5',
        'nq_open/em_paper/0 nq_open/em_paper/1 nq_open/em_paper/5 nq_open/em_paper/64 '
        'trivia_qa/em_paper/0 trivia_qa/em_paper/1 trivia_qa/em_paper/5 trivia_qa/em_paper/64',
        """
        llama_7b   16.8 18.7 22.0 26.1 50.0 53.4 56.3 57.6
        llama_13b  20.1 23.4 28.1 31.9 56.6 60.5 63.1 64.0
        llama_33b  24.9 28.3 32.9 36.0 65.1 67.9 69.9 70.4
        llama_65b  23.8 31.0 35.0 39.9 68.2 71.6 72.6 73.0
        """,
    ),
    (
        'LLaMA paper (arXiv:2302.13971), Tables 6 to 8',
        'race_middle/acc_norm/0 race_high/acc_norm/0 math/exact_match/4 math/maj1@256/4 '
        'gsm8k_cot/exact_match/8 gsm8k_cot/maj1@100/8 human_eval/pass@1/0 human_eval/pass@100/0 '
        'mbpp/pass@1/3 mbpp/pass@80/3',
        """
        llama_7b   61.1 46.9  2.9  6.9 11.0 18.1 10.5 36.5 17.7 56.2
        llama_13b  61.6 47.2  3.9  8.8 17.8 29.3 15.8 52.5 22.0 64.0
        llama_33b  64.1 48.3  7.1 15.2 35.6 53.1 21.7 70.7 30.2 73.4
        llama_65b  67.9 51.6 10.6 20.5 50.9 69.7 23.7 79.3 37.7 76.8
        """,
    ),
    (
        'LLaMA paper (arXiv:2302.13971), Tables 9 and 10',
        'mmlu/acc_humanities/5 mmlu/acc_stem/5 mmlu/acc_social_sciences/5 mmlu/acc_other/5 mmlu/acc/5',
        """
        llama_7b            34.0 30.5 38.3 38.1 35.1
        llama_13b           45.0 35.8 53.8 53.3 46.9
        llama_33b           55.8 46.0 66.7 63.4 57.8
        llama_65b           61.8 51.7 72.9 67.4 63.4
        llama_65b_instruct  67.4 56.6 79.2 72.6 68.9
        """,
    ),
    (
        'LLaMA paper (arXiv:2302.13971), Tables 11, 13 and 14 (toxicity in hundredths)',
        'real_toxicity_prompts/toxicity/0 real_toxicity_prompts_respectful/toxicity/0 winogender/acc/0 '
        'winogender/acc_female/0 winogender/acc_male/0 winogender/acc_neutral/0 '
        'winogender/acc_gotcha_female/0 winogender/acc_gotcha_male/0 truthful_qa_gen/truthful/0',
        """
        llama_7b   10.6  8.1 66.0 65.0 60.8 72.1 64.2 55.0 33
        llama_13b  10.4  9.5 64.7 66.7 62.5 65.0 65.8 55.8 47
        llama_33b  10.7  8.7 69.0 66.7 62.1 78.3 61.7 55.8 52
        llama_65b  12.8 14.1 77.5 78.8 72.1 81.7 75.0 63.3 57
        """,
    ),
    (
        'LLaMA paper (arXiv:2302.13971), Table 12',
        'crows_pairs/pct_stereotype/gender/0 crows_pairs/pct_stereotype/religion/0 '
        'crows_pairs/pct_stereotype/race-color/0 crows_pairs/pct_stereotype/sexual-orientation/0 '
        'crows_pairs/pct_stereotype/age/0 crows_pairs/pct_stereotype/nationality/0 '
        'crows_pairs/pct_stereotype/disability/0 crows_pairs/pct_stereotype/physical-appearance/0 '
        'crows_pairs/pct_stereotype/socioeconomic/0 crows_pairs/pct_stereotype/0',
        """
        llama_65b  70.6 79.0 57.0 81.0 70.1 64.2 66.7 77.8 71.5 66.6
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 20',
        'boolq/acc_answer/0 piqa/acc_norm/0 siqa/acc_norm/0 hellaswag/acc_norm/0 winogrande/acc/0 '
        'arc_easy/acc_norm/0 arc_challenge/acc_norm/0 openbookqa/acc_answer/0 commonsense_qa/acc/7 '
        'mmlu/acc/5',
        """
        llama2_7b   77.4 78.8 48.3 77.2 69.2 75.2 45.9 58.6 57.8 45.3
        llama2_13b  81.7 80.5 50.3 80.7 72.8 77.3 49.4 57.0 67.3 54.8
        llama2_34b  83.7 81.9 50.9 83.3 76.7 79.4 54.5 58.2 74.3 62.6
        llama2_70b  85.0 82.8 50.7 85.3 80.2 80.2 57.4 60.2 78.5 68.9
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 20 (LLaMA 1)',
        'commonsense_qa/acc/7',
        """
        llama_7b   33.6
        llama_13b  62.0
        llama_33b  72.5
        llama_65b  74.0
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 19',
        'mmlu/acc_humanities/5 mmlu/acc_stem/5 mmlu/acc_social_sciences/5 mmlu/acc_other/5',
        """
        llama2_7b   42.9 36.4 51.2 52.2
        llama2_13b  52.8 44.1 62.6 61.1
        llama2_34b  59.4 52.1 71.8 69.2
        llama2_70b  65.0 58.0 80.3 74.6
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Tables 21 and 25',
        'human_eval/pass@1/0 human_eval/pass@100/0 mbpp/pass@1/3 mbpp/pass@80/3 gsm8k_cot/exact_match/8 '
        'math/exact_match/4',
        """
        llama2_7b   12.8 45.6 20.8 62.8 14.6  2.5
        llama2_13b  18.3 60.2 30.6 69.0 28.7  3.9
        llama2_34b  22.6 77.2 33.0 76.1 42.2 6.24
        llama2_70b  29.9 89.0 45.0 81.4 56.8 13.5
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 22 (TriviaQA: Wikipedia subset)',
        'nq_open/em_paper/0 nq_open/em_paper/1 nq_open/em_paper/5 nq_open/em_paper/64 '
        'trivia_qa/em_paper/0* trivia_qa/em_paper/1* trivia_qa/em_paper/5* trivia_qa/em_paper/64*',
        """
        llama_7b    16.8 18.7 22.0 26.1 63.3 67.4 70.4 71.0
        llama_13b   20.1 23.4 28.1 31.9 70.1 74.4 77.1 77.9
        llama_33b   24.9 28.3 32.9 36.0 78.7 80.7 83.8 83.6
        llama_65b   23.8 31.0 35.0 39.9 81.7 84.5 85.9 86.0
        llama2_7b   16.4 22.7 25.7 29.5 65.8 68.9 72.1 73.7
        llama2_13b  16.1 28.0 31.2 34.6 73.1 77.2 79.6 79.4
        llama2_34b  25.1 30.0 32.8 39.9 81.0 83.3 84.5 84.6
        llama2_70b  25.3 33.0 39.5 44.3 82.4 85.0 87.6 87.5
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 23',
        'squad/exact_match/0* squad/exact_match/1* squad/exact_match/4* squad/exact_match/5* quac/f1/0* '
        'quac/f1/1*',
        """
        llama_7b    60.0 62.3 63.3 62.8 38.9 32.0
        llama_13b   68.9 68.4 66.4 66.7 39.9 36.5
        llama_33b   75.5 77.0 76.3 75.6 44.1 40.3
        llama_65b   79.4 80.0 78.3 77.9 41.0 39.8
        llama2_7b   67.2 72.3 72.6 72.5 39.4 39.7
        llama2_13b  72.9 72.1 70.6 71.3 42.7 44.8
        llama2_34b  77.4 78.8 77.5 77.5 42.9 44.4
        llama2_70b  80.7 82.6 81.9 81.9 42.4 49.3
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 24 (3 to 5 examples)',
        'agieval/acc_english/3 agieval/acc/aqua-rat/3 agieval/acc/logiqa-en/3 agieval/acc/lsat-ar/3 '
        'agieval/acc/lsat-lr/3 agieval/acc/lsat-rc/3 agieval/acc/sat-en/3 '
        'agieval/acc/sat-en-without-passage/3 agieval/acc/sat-math/3',
        """
        llama_7b    23.9 18.9 24.6 26.1 19.2 21.9 33.0 32.5 22.3
        llama_13b   33.9 20.1 34.9 22.2 31.6 39.8 52.9 45.1 29.5
        llama_33b   41.7 18.9 37.3 18.7 48.0 59.5 74.8 44.7 35.0
        llama_65b   47.6 23.6 42.1 23.9 56.7 63.6 83.0 48.1 41.8
        llama2_7b   29.3 23.2 31.0 23.9 22.4 32.7 43.2 37.4 28.2
        llama2_13b  39.1 21.7 38.1 23.0 41.0 54.6 62.1 46.1 27.3
        llama2_34b  43.4 19.3 40.7 21.3 47.5 62.1 77.2 49.0 32.7
        llama2_70b  54.2 23.2 48.8 25.7 70.2 76.6 86.9 53.4 41.8
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 3',
        'bbh/exact_match/3',
        """
        llama_7b    30.3
        llama_13b   37.0
        llama_33b   39.8
        llama_65b   43.5
        llama2_7b   32.6
        llama2_13b  39.4
        llama2_34b  44.1
        llama2_70b  51.2
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Tables 11, 14 and 44',
        'truthful_qa_gen/truthful_and_informative/0 truthful_qa_gen/truthful/0 '
        'truthful_qa_gen/informative/0 toxigen/toxic/0*',
        """
        llama_7b         27.42 32.31 94.86 23.00
        llama_13b        41.74 45.78 95.72 23.08
        llama_33b        44.19 48.71 95.23 22.57
        llama_65b        48.71 51.29 96.82 21.77
        llama2_7b        33.29 39.53 93.02 21.25
        llama2_13b       41.86 45.65 96.08 26.10
        llama2_34b       43.45 46.14  96.7 21.19
        llama2_70b       50.18 53.37 96.21 24.60
        llama2_7b_chat   57.04 60.59 96.45  0.00
        llama2_13b_chat  62.18 65.73 96.45  0.00
        llama2_34b_chat  67.20 70.01 97.06  0.02
        llama2_70b_chat  64.14 67.07 97.06  0.01
        """,
    ),
    (
        'Llama 2 paper (arXiv:2307.09288), Table 47 (in hundredths)',
        'bold/sentiment/gender/American_actors/0 bold/sentiment/gender/American_actresses/0',
        """
        llama_7b         31 46
        llama_13b        29 43
        llama_33b        26 44
        llama_65b        30 44
        llama2_7b        29 42
        llama2_13b       32 44
        llama2_34b       25 45
        llama2_70b       28 44
        llama2_7b_chat   48 56
        llama2_13b_chat  46 53
        llama2_34b_chat  44 47
        llama2_70b_chat  44 49
        """,
    ),
    (
        "Meta's model cards of Llama 3 (April 2024), 3.1 and 3.2",
        'mmlu/acc_macro/5 mmlu_pro/exact_match/5* agieval/acc_english/3* commonsense_qa/acc/7* '
        'winogrande/acc/5 bbh/exact_match/3 arc_challenge/acc/25* trivia_qa/em_paper/5* '
        'squad/exact_match/1* quac/f1/1* boolq/acc/0 drop/f1/3*',
        """
        llama3_8b      66.6    - 45.9 72.6 76.1 61.1 78.6 78.5 76.4 44.4 75.7 58.4
        llama3_70b     79.5    - 63.0 83.8 83.1 81.3 93.0 89.7 85.6 51.1 79.0 79.7
        llama3_1_8b    66.7 37.1 47.8 75.0 60.5 64.2 79.7 77.6 77.0 44.9 75.0 59.5
        llama3_1_70b   79.3 53.8 64.6 84.1 83.3 81.6 92.9 89.8 81.8 51.1 79.4 79.6
        llama3_1_405b  85.2 61.6 71.6 85.8 86.7 85.9 96.1 91.8 89.3 53.6 80.0 84.8
        llama3_2_1b    32.2    - 23.3    -    -    - 32.8    - 49.2 37.9    - 28.0
        llama3_2_3b    58.0    - 39.2    -    -    - 69.1    - 67.7 42.9    - 45.2
        """,
    ),
    (
        'Llama 3 paper (arXiv:2407.21783), Tables 9 to 14 (pre-trained 3.1)',
        'race_high/acc/0* human_eval/pass@1/0 mbpp/pass@1/3 piqa/acc/0 siqa/acc/0 openbookqa/acc/0 '
        'winogrande/acc/5 gsm8k_cot/exact_match/8 math/exact_match/4',
        """
        llama3_1_8b    54.3 37.2 47.6 81.0 49.5 45.0 75.7 57.2 20.3
        llama3_1_70b   59.0 58.5 66.2 83.8 52.2 47.6 83.5 83.7 41.4
        llama3_1_405b  58.1 61.0 73.4 85.6 53.7 49.2 82.2 89.0 53.8
        """,
    ),
    (
        "Meta's evaluation details of Llama 3 and 3.1 (micro average)",
        'mmlu/acc/5',
        """
        llama3_8b      65.4
        llama3_70b     78.9
        llama3_1_8b    65.6
        llama3_1_70b   79.0
        llama3_1_405b  85.4
        """,
    ),
    (
        "Meta's model cards of Llama 3.1, 3.2 and 3.3, instruction-tuned",
        'mmlu/acc_macro/5* mmlu/acc_macro/0* mmlu_pro/exact_match/5* ifeval/acc/0* arc_challenge/acc/0* '
        'gpqa/acc/0* hellaswag/acc/0* human_eval/pass@1/0 mbpp/pass@1/0* gsm8k_cot/exact_match/8 '
        'math/exact_match/0* api_bank/acc/0* bfcl_v2/acc/0* nexus/acc/0* mgsm/exact_match/0*',
        """
        llama3_8b_instruct      68.5 65.3 45.5 76.8 82.4 34.6    - 60.4 70.6 80.6 29.1 48.3    - 18.1    -
        llama3_1_8b_instruct    69.4 73.0 48.3 80.4 83.4 30.4 78.7 72.6 72.8 84.5 51.9 82.6 65.4 38.5 68.9
        llama3_70b_instruct     82.0 80.9 63.4 82.9 94.4 39.5    - 81.7 82.5 93.0 51.0 85.1    - 47.8    -
        llama3_1_70b_instruct   83.6 86.0 66.4 87.5 94.8 46.7    - 80.5 86.0 95.1 68.0 90.0 77.5 56.7 86.9
        llama3_1_405b_instruct  87.3 88.6 73.3 88.6 96.9 50.7    - 89.0 88.6 96.8 73.8 92.0 81.1 58.7 91.6
        llama3_3_70b_instruct      - 86.0 68.9 92.1    -    -    - 88.4 87.6    - 77.0    - 77.3    - 91.1
        llama3_2_1b_instruct    49.3    -    - 59.5 59.4 27.2 41.2    -    - 44.4 30.6    - 25.7 13.5 24.5
        llama3_2_3b_instruct    63.4    -    - 77.4 78.6 32.8 69.8    -    - 77.7 48.0    - 67.0 34.3 58.2
        """,
    ),
    (
        "Meta's model card of Llama 3 (April 2024), instruction-tuned",
        'mmlu/acc_macro/5* gpqa/acc/0* human_eval/pass@1/0 gsm8k_cot/exact_match/8 math/exact_match/4',
        """
        llama3_8b_instruct   68.4 34.2 62.2 79.6 30.0
        llama3_70b_instruct  82.0 39.5 81.7 93.0 50.4
        llama2_7b_chat       34.1 21.7  7.9 25.7  3.8
        llama2_13b_chat      47.8 22.3 14.0 41.2  6.7
        llama2_70b_chat      52.9 21.0 25.6 57.5 11.6
        """,
    ),
    (
        "Meta's model card of LLaMA",
        'arc_easy/acc_norm/0',
        """
        llama_7b   76.7
        llama_13b  78.1
        llama_33b  81.4
        llama_65b  81.5
        """,
    ),
    (
        "Meta's model card of Llama 3 (April 2024), its harness",
        'mmlu/acc_macro/5 agieval/acc_english/3* commonsense_qa/acc/7* winogrande/acc/5 bbh/exact_match/3 '
        'arc_challenge/acc/25* trivia_qa/em_paper/5* squad/exact_match/1* quac/f1/1* boolq/acc/0 drop/f1/3*',
        """
        llama2_7b   45.7 28.8 57.6 73.3 38.1 53.7 72.1 72.2 39.6 65.5 37.9
        llama2_13b  53.8 38.7 67.6 75.4 47.0 67.6 79.6 72.1 44.9 66.9 49.8
        llama2_70b  69.7 54.8 78.7 81.8 65.7 85.3 87.5 82.6 49.4 73.1 70.2
        """,
    ),
)

# LLaMA paper, Table 16: accuracy on each subject of MMLU, 5-shot; a column a model (the last is LLaMA-I).
MMLU_MODELS = ('llama_7b', 'llama_13b', 'llama_33b', 'llama_65b', 'llama_65b_instruct')
MMLU_SUBJECTS = """
    abstract_algebra                    29.0 34.0 32.0 34.0 31.0
    anatomy                             37.0 45.9 51.9 57.8 62.2
    astronomy                           33.6 46.1 61.8 72.4 81.6
    business_ethics                     40.0 45.0 56.0 57.0 72.0
    clinical_knowledge                  35.1 45.7 57.4 65.3 69.1
    college_biology                     37.5 45.1 58.3 68.8 81.9
    college_chemistry                   32.0 30.0 45.0 50.0 45.0
    college_computer_science            29.0 39.0 45.0 47.0 51.0
    college_mathematics                 33.0 32.0 40.0 35.0 36.0
    college_medicine                    30.6 42.8 52.0 54.3 63.0
    college_physics                     26.5 18.6 28.4 36.3 46.1
    computer_security                   45.0 65.0 66.0 79.0 79.0
    conceptual_physics                  36.6 41.3 51.5 59.6 66.4
    econometrics                        23.7 27.2 35.1 40.4 52.6
    electrical_engineering              26.9 40.7 49.7 53.8 60.7
    elementary_mathematics              24.3 24.9 36.0 37.8 42.9
    formal_logic                        27.0 33.3 34.1 44.4 47.6
    global_facts                        29.0 35.0 35.0 39.0 40.0
    high_school_biology                 34.5 52.6 67.7 73.9 82.9
    high_school_chemistry               28.1 28.6 41.9 40.4 44.8
    high_school_computer_science        31.0 48.0 60.0 67.0 73.0
    high_school_european_history        44.2 61.8 73.9 78.8 86.1
    high_school_geography               34.3 54.6 70.7 77.8 87.9
    high_school_government_and_politics 44.6 66.3 82.9 88.1 92.8
    high_school_macroeconomics          35.4 44.4 56.9 65.9 69.2
    high_school_mathematics             24.8 23.7 27.0 34.4 37.0
    high_school_microeconomics          31.9 47.5 55.5 68.9 78.6
    high_school_physics                 26.5 28.5 35.8 37.1 41.7
    high_school_psychology              47.3 60.9 76.2 82.2 87.9
    high_school_statistics              35.2 30.1 45.4 58.3 59.3
    high_school_us_history              39.7 58.3 77.9 83.8 90.7
    high_school_world_history           40.9 66.2 79.3 83.1 89.0
    human_aging                         40.8 54.7 67.7 69.5 72.2
    human_sexuality                     36.6 58.8 64.1 77.9 87.0
    international_law                   51.2 62.8 72.7 79.3 87.6
    jurisprudence                       38.9 51.9 70.4 73.2 85.2
    logical_fallacies                   39.3 52.8 68.1 77.3 80.4
    machine_learning                    23.2 31.3 39.3 49.1 52.7
    management                          35.0 66.0 77.7 82.5 83.5
    marketing                           46.6 71.8 83.3 85.9 92.7
    medical_genetics                    43.0 52.0 67.0 67.0 68.0
    miscellaneous                       42.4 65.4 78.5 82.1 84.3
    moral_disputes                      40.2 50.9 66.2 72.3 76.9
    moral_scenarios                     24.3 30.1 38.2 48.9 55.9
    nutrition                           37.6 51.6 62.8 67.3 74.5
    philosophy                          39.9 54.0 66.2 74.0 79.1
    prehistory                          36.1 51.5 67.0 75.3 79.0
    professional_accounting             25.9 35.8 43.6 46.5 56.0
    professional_law                    30.2 38.0 45.9 49.1 54.4
    professional_medicine               44.5 50.4 54.0 61.4 70.6
    professional_psychology             35.1 47.7 62.9 65.7 71.4
    public_relations                    40.9 60.9 67.3 73.6 74.6
    security_studies                    31.8 53.9 65.3 71.8 77.6
    sociology                           46.8 61.2 78.6 78.6 88.1
    us_foreign_policy                   46.0 80.0 83.0 86.0 87.0
    virology                            30.1 43.4 50.0 53.0 57.8
    world_religions                     50.9 67.8 81.3 81.3 84.2
"""

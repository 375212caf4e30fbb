"""Chat templates for checkpoints that carry none, as Jinja sources.

Each writes what the template that its publisher ships writes for system, user and assistant messages.
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

_LLAMA3_DATED = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = DATE %}
{%- endif %}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

LLAMA3_1 = _LLAMA3_DATED.replace("DATE", "'26 Jul 2024'")
LLAMA3_2 = _LLAMA3_DATED.replace("DATE", "strftime_now('%d %b %Y')")

TINYLLAMA = """\
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- raise_exception('TinyLlama knows the roles system, user and assistant only') }}
    {%- endif %}
    {{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

_SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\n" + _SMOLLM2_SYSTEM + "<|im_end|>\n' }}"
    "{%- endif %}" + CHATML
)
